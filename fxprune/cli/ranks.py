"""A command on several ranks, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fxprune.errors import DistributedError

SHARED = ("compress", "score", "apply")  # the commands whose work ranks can share


def started_rank() -> int:
    """The rank that torchrun gave this process; 0 where it did not start it."""
    return int(os.environ.get("RANK", "0")) if _size() > 1 else 0


@contextmanager
def process_group(command: str) -> Iterator[None]:
    """The process group of torchrun's ranks, for the time of a command; nothing where there is one rank.

    Raises DistributedError where the command's work cannot be shared.
    """
    if _size() == 1:
        yield
        return
    if command not in SHARED:
        raise DistributedError(
            f"fxprune {command} works on one rank, and torchrun started {_size()}: start it without torchrun; "
            f"{', '.join(SHARED)} share their work"
        )
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
