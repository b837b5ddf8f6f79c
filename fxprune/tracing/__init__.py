"""From a model, or a named part of it, to a graph with shapes and flops that is proven to be the model."""
