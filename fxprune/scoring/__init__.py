"""The pass over the loader, what it gathers, and the scores of every unit."""
