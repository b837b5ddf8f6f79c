"""The proof that a captured graph is the caller's model: both are run on the example and on other batches."""
