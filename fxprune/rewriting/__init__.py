"""From a graph and the units to keep to the narrow graph, its oracle and its proof."""
