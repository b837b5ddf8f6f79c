"""Decoders that do not fit into memory: scored, pruned, refitted and written one block at a time."""

from fxprune.integrations.blockwise.compress import compress_folder
from fxprune.integrations.blockwise.record import BlockRecord, FolderReport

__all__ = ["BlockRecord", "FolderReport", "compress_folder"]
