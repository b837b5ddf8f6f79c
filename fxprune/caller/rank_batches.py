"""The batches of a loader that this rank reads, with the number of their first sample in the whole loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from fxprune.caller.batches import LONGEST, Unpack, batches
from fxprune.caller.ranks import rank_and_size

Numbered = tuple[int | None, Any, Any]  # the number of the batch's first sample, its inputs, its targets
_KEPT = (
    "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankShare:
    """A loader that holds the batches of this rank alone; `samples` is the number on all ranks."""

    own: Sequence[Numbered]
    samples: int

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return ((inputs, targets) for _, inputs, targets in self.own)


class RankBatches:
    """This rank's batches of a loader: those with number % ranks == rank.

    Every rank gets the same loader, over all samples. A DataLoader reads the rank's own samples only; other loaders are
    read whole, and the batches of other ranks are dropped. No batch is read after `most` samples. `count(inputs,
    targets)` gives the number of samples of a batch; after the iteration, `samples` is the number on all ranks. A
    single rank reads all batches, and the number of a first sample is then None.
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
        elif isinstance(self.loader, RankShare):
            self.samples = self.loader.samples
            yield from self.loader.own
        elif isinstance(self.loader, DataLoader) and _splits(self.loader):
            own = _Own(self.loader, rank, size, self.most)
            for inputs, targets in batches(own.loader(), self.unpack, least=0):
                yield own.firsts.popleft(), inputs, targets
            self.samples, self._digest = own.samples, own.digest
        else:
            for number, (first, inputs, targets) in enumerate(self._numbered()):
                self._digest = self._digest if number else digest(inputs)
                if number % size == rank:
                    yield first, inputs, targets

    def whole(self) -> Iterator[Numbered]:
        """The batches of all ranks."""
        yield from ((None, inputs, targets) for _, inputs, targets in self._numbered())

    def _numbered(self) -> Iterator[tuple[int, Any, Any]]:
        self.samples = 0
        for inputs, targets in batches(self.loader, self.unpack, most=LONGEST if self.most is None else None):
            yield self.samples, inputs, targets
            self.samples += self.count(inputs, targets)
            if self.most is not None and self.samples >= self.most:
                return


class _Own(BatchSampler):
    """The index lists of one rank's batches; `firsts` are the numbers of the first samples of those given out."""

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
        return DataLoader(batch_sampler=self, **{name: getattr(self.whole, name) for name in _KEPT})


def _splits(loader: DataLoader[Any]) -> bool:
    """Whether the samples of each batch of a loader are known."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def _all_of(loader: DataLoader[Any]) -> Any:
    """The index lists of all batches; of a DistributedSampler, in the order of a single rank."""
    sampler, given = loader.sampler, loader.batch_sampler
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return given
    single: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=sampler.drop_last
    )
    single.set_epoch(sampler.epoch)
    return BatchSampler(single, loader.batch_size, loader.drop_last)


def digest(inputs: Any) -> int:
    """A checksum of the shapes and sums of a batch's tensors."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return crc32(repr([(tuple(t.shape), f"{float(t.double().sum()):.9g}") for t in tensors]).encode())
