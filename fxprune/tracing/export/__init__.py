"""The third way to a graph: a program of torch.export, rebuilt over the layers of the model."""
