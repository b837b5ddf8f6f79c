"""From a graph to groups of channels that must be removed together."""
