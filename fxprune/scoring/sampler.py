"""Sampling: which samples the U-Score compares, and the activations of them that are stored for each edge."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.classes import majority
from fxprune.caller.ranks import gathered, summed
from fxprune.scoring.position_classes import ClassMap, first_of_each

_integers = partial(torch.empty, 0, dtype=torch.int64)


@dataclass(slots=True, eq=False)
class EdgeSamples:
    """Samples of one edge: `parts` (rows, units, projections); of every row the class in `labels`, and a key.

    Of each class the rows with the lowest `keys` are kept. `parts` have few projections where a unit has few positions.
    """

    units: int
    dtype: torch.dtype
    parts: list[Tensor] = field(default_factory=list)
    labels: Tensor = field(default_factory=_integers)
    keys: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.float64))

    def add(self, part: Tensor, labels: Tensor, keys: Tensor) -> None:
        """Store more rows."""
        self.parts.append(part)
        self.labels, self.keys = torch.cat([self.labels, labels]), torch.cat([self.keys, keys])

    def joined(self, projections: int) -> Tensor:
        """All rows in one tensor, on at most so many projections."""
        width = min(projections, max((part.shape[-1] for part in self.parts), default=projections))
        parts = [part[..., :width].expand(*part.shape[:2], width) for part in self.parts]
        return torch.cat([torch.empty(0, self.units, width, dtype=self.dtype), *parts])

    def keep(self, rows: Tensor, projections: int) -> None:
        """Drop all rows but these."""
        self.parts, self.labels, self.keys = [self.joined(projections)[rows]], self.labels[rows], self.keys[rows]

    def state(self, projections: int) -> dict[str, Tensor]:
        """The rows as named tensors."""
        if not self.parts:
            return {}
        return {"samples": self.joined(projections), "labels": self.labels, "keys": self.keys}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the rows that `state` gave."""
        if "samples" in state:
            self.parts, self.labels, self.keys = [state["samples"]], state["labels"], state["keys"]


@dataclass(slots=True, eq=False)
class Sampler:
    """Chooses the samples that the U-Score compares: the first of each class, of `max_classes` classes at most.

    Where nothing `compares` classes, samples are only counted. All probes share it: `numbers` (samples,) are those of
    the batch's samples in the whole loader, `rows` the rows of the batch to store, `labels` their classes; `positions`
    are chosen instead where these have classes of their own. `gathers` says whether probes gather moments.
    """

    per_class: int
    max_classes: int | None
    memory: int
    projections: int
    seed: int
    compares: bool = True
    gathers: bool = True
    counts: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    seen: int = 0
    batch: int = 0
    numbers: Tensor = field(default_factory=_integers)
    rows: Tensor = field(default_factory=_integers)
    labels: Tensor = field(default_factory=_integers)
    positions: ClassMap | None = None
    edges: list[EdgeSamples] = field(default_factory=list)
    most: int = field(init=False)  # projections; fewer are the first of these, so that earlier and later ones compare
    _block: Tensor = field(default_factory=partial(torch.empty, 0))
    _used: int = 0

    def __post_init__(self) -> None:
        self.most = self.projections

    def edge(self, units: int, dtype: torch.dtype) -> EdgeSamples:
        """A store for the samples of one more edge."""
        self.edges.append(EdgeSamples(units, torch.float64 if dtype == torch.float64 else torch.float32))
        return self.edges[-1]

    def count(self, samples: int, first: int | None = None) -> None:
        """Count a batch of so many samples, numbered from `first` on, by default from those seen so far."""
        self.numbers = torch.arange(samples) + (self.seen if first is None else first)
        self.seen += samples
        self.batch += 1

    def choose(self, classes: Tensor, first: int | None = None) -> None:
        """Count a batch, and choose what is stored of it; a sample whose positions have classes is of the commonest."""
        self.count(len(classes), first)
        self._admit({label for label in classes.unique().tolist() if label >= 0})
        labels, self.positions = classes, None
        if classes.ndim > 1:
            labels = majority(classes)
            compared = torch.where(torch.isin(classes, torch.tensor(list(self.counts))), classes, -1)
            self.positions = ClassMap(compared, self.numbers, self.per_class, self.seed)
        rows = []
        for row, label in enumerate(labels.tolist()):
            if label in self.counts and self.counts[label] < self.per_class:
                self.counts[label] += 1
                rows.append(row)
        self.rows = torch.tensor(rows, dtype=torch.int64)
        self.labels = labels[self.rows]
        # One block for all samples of a batch: many small ones between the activations would split the heap.
        size = len(rows) * self.projections * sum(edge.units for edge in self.edges)
        self._block, self._used = torch.empty(size, dtype=self.edges[0].dtype if self.edges else None), 0

    def room(self, *shape: int) -> Tensor:
        """The next part of the batch's block, in the given shape; a tensor of its own where the rest is too small."""
        start, self._used = self._used, self._used + math.prod(shape)
        fits = self._used <= len(self._block)
        return self._block[start : self._used].view(shape) if fits else self._block.new_empty(shape)

    def _admit(self, present: set[int]) -> None:
        """Count the `max_classes` first of all classes so far, and leave out the others."""
        known = (set(self.counts) | present) - self.left_out
        admitted = self.first_of(known)
        self.left_out |= known - admitted
        self.counts = {label: self.counts.get(label, 0) for label in sorted(admitted)}

    def first_of(self, classes: set[int]) -> set[int]:
        """The first `max_classes` of the classes in a seeded order of all classes; all of them where it is None."""
        if self.max_classes is None:
            return classes
        return set(heapq.nsmallest(self.max_classes, classes, key=lambda label: _order(label, self.seed)))

    def bound(self) -> None:
        """Halve the projections, and from one on the samples of a class, until the stored samples fit their memory."""
        while sum(part.nbytes for edge in self.edges for part in edge.parts) > self.memory:
            if self.projections > 1:
                self.projections //= 2
                for edge in self.edges:
                    edge.parts = [part[..., : self.projections].clone() for part in edge.parts]
            elif self.per_class > 1:
                self._keep(self.per_class // 2)
            else:
                return

    def _keep(self, per_class: int) -> None:
        """Keep fewer samples of each class."""
        self.per_class = per_class
        self.counts = {label: min(count, per_class) for label, count in self.counts.items()}
        for edge in self.edges:
            if edge.parts:
                edge.keep(first_of_each(edge.labels, edge.keys, per_class).sort().values, self.projections)

    def merge_ranks(self) -> None:
        """Keep the samples that a single rank would have kept, of every class that all ranks admit."""
        self.seen = int(summed(torch.tensor(self.seen)))
        if not self.compares:
            return
        known = torch.cat(gathered(torch.tensor(sorted({*self.counts, *self.left_out}), dtype=torch.int64)))
        admitted = torch.tensor(sorted(self.first_of(set(known.tolist()))), dtype=torch.int64)
        own = torch.tensor([self.counts.get(label, 0) for label in admitted.tolist()], dtype=torch.int64)
        self.per_class, self.projections = min(_of_ranks(self.per_class)), min(_of_ranks(self.projections))
        counts = summed(own).clamp_max(self.per_class).tolist()
        self.counts = dict(zip(admitted.tolist(), counts, strict=True))
        for edge in self.edges:
            widest = max(_of_ranks(max([part.shape[-1] for part in edge.parts], default=0)))
            samples = torch.cat(gathered(edge.joined(min(widest, self.projections))))
            labels, keys = torch.cat(gathered(edge.labels)), torch.cat(gathered(edge.keys))
            chosen = torch.isin(labels, admitted).nonzero()[:, 0]
            kept = chosen[first_of_each(labels[chosen], keys[chosen], self.per_class)].sort().values
            if len(kept):
                edge.parts, edge.labels, edge.keys = [samples[kept]], labels[kept], keys[kept]
        self.bound()

    def state(self) -> dict[str, Any]:
        """All counts and decisions so far, as plain numbers."""
        return {
            "seen": self.seen, "batch": self.batch, "projections": self.projections, "per_class": self.per_class,
            "counts": sorted(self.counts.items()), "left_out": sorted(self.left_out),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the numbers that `state` gave."""
        for name in ("seen", "batch", "projections", "per_class"):
            setattr(self, name, int(state[name]))
        self.counts = {int(label): int(count) for label, count in state["counts"]}
        self.left_out = {int(label) for label in state["left_out"]}


def _of_ranks(number: int) -> list[int]:
    return [int(part) for part in gathered(torch.tensor([number]))]


def _order(label: int, seed: int) -> int:
    """A seeded random number for a class, the same in every process."""
    return int(np.random.SeedSequence([abs(label), int(label < 0), seed]).generate_state(1, np.uint64)[0])
