"""The pass over the loader, and the scores of every unit."""
