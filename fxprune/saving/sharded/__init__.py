"""Checkpoints larger than memory, rewritten shard by shard."""
