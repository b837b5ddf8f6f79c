"""Sampling: which samples of a loader the U-Score compares."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.classes import majority
from fxprune.scoring.position_draw import PositionDraw
from fxprune.scoring.probes import Draw, Probe


@dataclass(slots=True)
class Sampler:
    """Chooses the samples that the U-Score compares: the first of each class, of `max_classes` classes at the most.

    Where nothing `compares` classes, it only counts.
    """

    per_class: int
    max_classes: int | None
    memory: int
    draw: Draw
    compares: bool = True
    counts: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    seen: int = 0

    def count(self, samples: int, first: int | None = None) -> None:
        """Count a batch of so many samples, and give them their numbers, from `first` on or from those seen so far."""
        self.draw.numbers = torch.arange(samples) + (self.seen if first is None else first)
        self.seen += samples
        self.draw.batch += 1

    def choose(self, classes: Tensor, probes: list[Probe], first: int | None = None) -> None:
        """Set what the probes sample of the batch, and make room for their samples.

        Where positions have classes, a sample's own is that of most of them.
        """
        self.count(len(classes), first)
        self._admit({label for label in classes.unique().tolist() if label >= 0})
        if classes.ndim > 1:
            self._show(classes)
        labels = majority(classes) if classes.ndim > 1 else classes
        rows = []
        for row, label in enumerate(labels.tolist()):
            if label in self.counts and self.counts[label] < self.per_class:
                self.counts[label] += 1
                rows.append(row)
        self.draw.rows = torch.tensor(rows, dtype=torch.int64)
        self.draw.labels = labels[self.draw.rows]
        self.draw.make_room(probes)

    def _show(self, classes: Tensor) -> None:
        """Have positions drawn, of the classes that are compared."""
        self.draw.positions = self.draw.positions or PositionDraw(self.per_class, self.draw.seed)
        compared = torch.where(torch.isin(classes, torch.tensor(list(self.counts))), classes, -1)
        self.draw.positions.show(compared, self.draw.numbers)

    def _admit(self, present: set[int]) -> None:
        """Keep the `max_classes` classes that come first in a seeded order of all classes."""
        known = (set(self.counts) | present) - self.left_out
        admitted = self.first_of(known)
        self.left_out |= known - admitted
        self.counts = {label: self.counts.get(label, 0) for label in sorted(admitted)}

    def first_of(self, classes: set[int]) -> set[int]:
        """The `max_classes` of the classes that come first in a seeded order of all classes; all where it is None."""
        if self.max_classes is None:
            return classes
        return set(heapq.nsmallest(self.max_classes, classes, key=lambda label: _order(label, self.draw.seed)))

    def bound(self, probes: list[Probe]) -> None:
        """Keep the stored samples within their memory: on fewer projections, and where one is too many, fewer of them.

        Both are halved, so that what was stored before and comes after compares.
        """
        while sum(s.nbytes for p in probes for s in p.samples) > self.memory:
            if self.draw.projections > 1:
                self.draw.projections //= 2
                for probe in probes:
                    probe.samples = [s[..., : self.draw.projections].clone() for s in probe.samples]
            elif self.per_class > 1:
                self.keep(self.per_class // 2, probes)
            else:
                return

    def state(self) -> dict[str, Any]:
        """What was seen and decided so far, as plain numbers."""
        return {
            "seen": self.seen, "batch": self.draw.batch, "projections": self.draw.projections,
            "per_class": self.per_class, "counts": sorted(self.counts.items()), "left_out": sorted(self.left_out),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.seen, self.per_class = int(state["seen"]), int(state["per_class"])
        self.draw.batch, self.draw.projections = int(state["batch"]), int(state["projections"])
        self.counts = {int(label): int(count) for label, count in state["counts"]}
        self.left_out = {int(label) for label in state["left_out"]}

    def keep(self, per_class: int, probes: list[Probe]) -> None:
        """Keep the first samples of each class alone."""
        self.per_class = per_class
        self.counts = {label: min(count, per_class) for label, count in self.counts.items()}
        if self.draw.positions is not None:
            self.draw.positions.per_class = per_class
        for probe in probes:
            probe.keep(per_class)


def _order(label: int, seed: int) -> int:
    """A seeded random number for a class, the same in every process."""
    return int(np.random.SeedSequence([abs(label), int(label < 0), seed]).generate_state(1, np.uint64)[0])
