"""Work on several ranks: sums and collections over all ranks, and errors that all ranks share.

Where no process group is initialised there is one rank, and nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxprune.errors import DistributedError, first_line


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the number of ranks: (0, 1) where no process group is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def together(stage: str) -> Iterator[None]:
    """Work of all ranks: a failure on one fails on all, and the errors of the others name its rank and cause."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is raised again, after the other ranks know of it
        failure = error
    texts = gathered_texts("" if failure is None else f"{type(failure).__name__}: {first_line(failure)}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise DistributedError(f"{stage} failed on rank {rank} of {len(texts)}: {text}")


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks of a tensor that has the same shape on each."""
    if rank_and_size()[1] == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    _communicate(partial(dist.all_reduce, total))
    return total.to(tensor.device)


def gathered(rows: Tensor) -> list[Tensor]:
    """The tensors (rows, ...) of all ranks, which may differ in their number of rows."""
    _, size = rank_and_size()
    if size == 1:
        return [rows]
    if rows.dtype == torch.bool:
        return [part.bool() for part in gathered(rows.to(torch.uint8))]
    counts = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(size)]
    _communicate(partial(dist.all_gather, counts, torch.tensor([len(rows)], device=_device())))
    most = max(int(count) for count in counts)
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=_device())
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(size)]
    _communicate(partial(dist.all_gather, found, padded))
    return [part[: int(count)].to(rows.device) for part, count in zip(found, counts, strict=True)]


def in_all(flag: bool) -> bool:  # noqa: FBT001
    """Whether `flag` is true on every rank."""
    return int(summed(torch.tensor(int(flag)))) == rank_and_size()[1]


def in_any(flag: bool) -> bool:  # noqa: FBT001
    """Whether `flag` is true on some rank."""
    return not in_all(not flag)


def give_from_first(module: nn.Module) -> None:
    """Copy the numbers of rank 0's module to those of the other ranks."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            first = tensor.to(_device(), copy=True)
            _communicate(partial(dist.broadcast, first, 0))
            tensor.copy_(first)


def gathered_texts(text: str) -> list[str]:
    """A text of each rank."""
    parts = gathered(torch.tensor(list(text.encode()), dtype=torch.uint8))
    return [bytes(part.tolist()).decode() for part in parts]


def check_same(what: str, text: str, remedy: str) -> None:
    """Raise DistributedError where `text`, which describes `what`, differs between ranks."""
    texts = gathered_texts(text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise DistributedError(f"{what} on rank {rank} is {other}, on rank 0 {texts[0]}: {remedy}")


def _device() -> torch.device:
    """The device on which tensors can be communicated."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _communicate(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        rank, size = rank_and_size()
        raise DistributedError(
            f"rank {rank} of {size} lost another rank, which ended or does not answer ({first_line(error)}): "
            "look for the first error among the ranks"
        ) from error
