"""Which batches of a loader this rank reads, and the number of their first sample in the whole loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from zlib import crc32

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from fxprune.caller.batches import LONGEST, Unpack, batches
from fxprune.caller.ranks import rank_and_size

Numbered = tuple[int | None, Any, Any]  # the number of the batch's first sample, its inputs, its targets


class RankBatches:
    """This rank's share of a loader: every batch whose number leaves the rank, divided by the number of ranks.

    Every rank is given the same loader, over all samples. A DataLoader reads the rank's own samples only; of other
    loaders all batches are read, and those of other ranks dropped. No batch is read once there are `most` samples.
    `samples` is how many there were on all ranks, once the share was iterated, as `count` tells of the inputs and
    targets of a batch. A single rank reads all, and counts for itself: the number of a first sample is None then.
    """

    def __init__(
        self, loader: Iterable[Any], unpack: Unpack | None, count: Callable[[Any, Any], int], most: int | None = None
    ) -> None:
        self.loader, self.unpack, self.count, self.most = loader, unpack, count, most
        self.samples, self._digest = 0, 0

    def __str__(self) -> str:
        return f"one of {self.samples:,} samples with the digest {self._digest:08x}"

    def __iter__(self) -> Iterator[Numbered]:
        rank, size = rank_and_size()
        if size == 1:
            yield from self.whole()
        elif isinstance(self.loader, DataLoader) and _splits(self.loader):
            yield from self._of_indices(_Own(self.loader, rank, size, self.most))
        else:
            yield from self._of_batches(rank, size)

    def whole(self) -> Iterator[Numbered]:
        """The batches of all ranks."""
        for _, inputs, targets in self._numbered():
            yield None, inputs, targets

    def _numbered(self) -> Iterator[tuple[int, Any, Any]]:
        self.samples = 0
        for inputs, targets in batches(self.loader, self.unpack, most=LONGEST if self.most is None else None):
            yield self.samples, inputs, targets
            self.samples += self.count(inputs, targets)
            if self.most is not None and self.samples >= self.most:
                return

    def _of_batches(self, rank: int, size: int) -> Iterator[Numbered]:
        for number, (first, inputs, targets) in enumerate(self._numbered()):
            if number == 0:
                self._digest = digest(inputs)
            if number % size == rank:
                yield first, inputs, targets

    def _of_indices(self, own: _Own) -> Iterator[Numbered]:
        for inputs, targets in batches(own.loader(), self.unpack, least=0):
            yield own.firsts.popleft(), inputs, targets
        self.samples, self._digest = own.samples, own.digest


class _Own(BatchSampler):
    """The index lists of one rank's batches; `firsts` has the number of the first sample of each that was given."""

    def __init__(self, whole: DataLoader[Any], rank: int, size: int, most: int | None) -> None:
        self.whole, self.rank, self.size, self.most = whole, rank, size, most
        self.firsts: deque[int] = deque()
        self.samples = self.digest = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.firsts.clear()
        self.samples = self.digest = 0
        for number, indices in enumerate(_all_of(self.whole)):
            if self.most is not None and self.samples >= self.most:
                return
            if number % self.size == self.rank:
                self.firsts.append(self.samples)
                yield indices
            self.samples += len(indices)
            self.digest = crc32(repr(indices).encode(), self.digest)

    def __len__(self) -> int:
        return len(range(self.rank, len(_all_of(self.whole)), self.size))

    def loader(self) -> DataLoader[Any]:
        """A DataLoader that reads these batches."""
        whole = self.whole
        return DataLoader(
            whole.dataset, batch_sampler=self, num_workers=whole.num_workers, collate_fn=whole.collate_fn,
            pin_memory=whole.pin_memory, timeout=whole.timeout, worker_init_fn=whole.worker_init_fn,
            multiprocessing_context=whole.multiprocessing_context, generator=whole.generator,
            prefetch_factor=whole.prefetch_factor,
        )  # fmt: skip


def _splits(loader: DataLoader[Any]) -> bool:
    """Whether a loader tells which samples are in which batch."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def _all_of(loader: DataLoader[Any]) -> Any:
    """The index lists of all batches; those of a DistributedSampler's samples in the order of a single rank."""
    sampler, given = loader.sampler, loader.batch_sampler
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return given
    single: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=sampler.drop_last
    )
    single.set_epoch(sampler.epoch)
    return BatchSampler(single, loader.batch_size, loader.drop_last)


def digest(inputs: Any) -> int:
    """A number that tells one batch from another."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return crc32(repr([(tuple(t.shape), f"{float(t.double().sum()):.9g}") for t in tensors]).encode())
