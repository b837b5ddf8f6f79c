"""Probes: the gates of scoring, which take samples, moments and gradients where channels are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arrays import Index
from fxprune.caller.example import TensorSpec, is_dense
from fxprune.coupling.gates import Gate
from fxprune.coupling.groups import Edge
from fxprune.scoring.moments import Gathering
from fxprune.scoring.position_draw import PositionDraw, first_of_each
from fxprune.scoring.signals.separability import directions
from fxprune.scoring.signals.taylor import Through
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph, example_of


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the samples of a batch lie in a tensor: along `axis`, each in `times` consecutive places of it."""

    axis: int = 0
    times: int = 1

    def first(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        """The tensor with the samples along axis 0, and where `dim` is then."""
        if self.axis == dim:
            return x, dim
        moved, dim = x.movedim(self.axis, 0), dim + int(dim < self.axis)
        if self.times == 1:
            return moved, dim
        return moved.reshape(-1, self.times, *moved.shape[1:]), dim + 1


@dataclass(slots=True)
class Draw:
    """What the gates have in common while scoring: the rows of the batch to sample, how finely, and from which seed.

    `numbers` are those of the batch's samples in the whole loader, (samples,). `moments` says whether to gather them.
    `labels` are the classes of the rows. Where positions have classes of their own, `positions` draws them.
    """

    rows: Tensor
    projections: int
    seed: int
    moments: bool = False
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: PositionDraw | None = None
    batch: int = 0
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    room: Tensor = field(default_factory=lambda: torch.empty(0))
    used: int = 0
    most: int = field(init=False)

    def __post_init__(self) -> None:
        self.most = self.projections  # fewer are the first of these, so that samples taken before and after compare

    def make_room(self, probes: list[Probe]) -> None:
        """One block for all samples of a batch: many small ones between the activations would split the heap."""
        size = len(self.rows) * self.projections * sum(len(probe.own) for probe in probes)
        double = any(probe.weight.dtype == torch.float64 for probe in probes)
        dtype = torch.float64 if double else torch.float32
        self.room, self.used = torch.empty(size, dtype=dtype), 0

    def take(self, *shape: int) -> Tensor:
        """The next part of the block, of the given shape; a block of its own where the rest is too small."""
        start, self.used = self.used, self.used + math.prod(shape)
        enough = self.used <= len(self.room)
        return self.room[start : self.used].view(shape) if enough else self.room.new_empty(shape)


class Probe(Gate):
    """The scoring gate: takes samples in the forward pass and the R-Score's sums in the backward pass.

    `weight` stands at one for every position along the axis; its gradient is that of the loss by a factor there. Behind
    the positions come the own units; there, it is the sum of the sizes of the derivatives of single samples.
    `samples` collects tensors of shape (rows, own units, projections), `labels` the classes of their rows, and `keys`
    (rows,) what tells which of a class to keep: the lowest. `rows` says where the samples of a batch lie; None where
    the tensor does not depend on them.
    """

    STATE = (*Gathering.STATE, "samples", "labels", "keys")

    def __init__(
        self, edge: Edge, draw: Draw, device: torch.device, dtype: torch.dtype, rows: Rows | None = Rows()
    ) -> None:
        super().__init__(edge)
        self.rows = rows
        self.draw = draw
        self.own, self.positions = _positions(edge.units)
        self.of = None if self.positions is None else torch.from_numpy(_place_among(self.own, edge.units))
        self.weight = nn.Parameter(torch.ones(len(edge.units) + len(self.own), device=device, dtype=dtype))
        self.samples: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.keys = torch.empty(0, dtype=torch.float64)
        self.seen = 0
        self.gathering = Gathering(draw.seed) if draw.moments else None

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        if self.seen < self.draw.batch:
            self.seen = self.draw.batch
            self._take(x.detach())
            if not padded:
                self._gather(x.detach(), self.dim, self._numbered(x))
        return self._through(x, self.dim, self.rows)

    def weigh(self, weight: Tensor) -> Tensor:
        return self._through(weight, 1, None)

    def _through(self, x: Tensor, dim: int, rows: Rows | None) -> Tensor:
        found: Tensor = Through.apply(x, self.weight, dim, self.of, *self._samples(x, rows))  # type: ignore[no-untyped-call]
        return found

    def _samples(self, x: Tensor, rows: Rows | None) -> tuple[int | None, int]:
        """The axis of the samples in `x` and the places of each: in longer sequences than the example's, more."""
        if rows is None:
            return None, 1
        size, count = x.shape[rows.axis], len(self.draw.numbers)
        times = size // count if rows.times > 1 and count and size % count == 0 else rows.times
        return (rows.axis, times) if size % times == 0 else (None, 1)

    def watch(self, x: Tensor) -> None:
        self._gather(x, x.ndim - 1, None)

    def _numbered(self, x: Tensor) -> Rows | None:
        """Where the samples lie in `x`, if there are as many as the batch has numbers for."""
        rows, count = self.rows, len(self.draw.numbers)
        fits = rows is not None and rows.axis not in (self.dim, x.ndim) and x.shape[rows.axis] == count * rows.times
        return rows if fits else None

    def _gather(self, x: Tensor, dim: int, rows: Rows | None) -> None:
        if self.gathering is None:
            return
        if rows is None:
            self.gathering.add(x, dim, batch=int(self.draw.numbers[0]) if len(self.draw.numbers) else 0)
        else:
            self.gathering.add(*rows.first(x, dim), self.draw.numbers)

    def _take(self, x: Tensor) -> None:
        """Sample position by position where the positions have classes and `x` has the positions; else row by row."""
        if self.draw.positions is None and not len(self.draw.rows):
            return  # nothing compares samples, so batches of other lengths need no rows either
        by_row, dim = (x.unsqueeze(0), self.dim + 1) if self.rows is None else self.rows.first(x, self.dim)
        draw = self.draw.positions
        # Several places of a sample in a row are its steps, flattened, where they are all that it has; else windows.
        aligned = self.rows is not None and dim > 0 and (self.rows.times == 1 or by_row.ndim == 3)
        if draw is not None and aligned and draw.fits(by_row.movedim(dim, -1).shape[:-1]):
            self._take_positions(by_row.movedim(dim, -1), draw)
        elif len(self.draw.rows):
            self.samples.append(self._sample(by_row, dim))
            self.labels.append(self.draw.labels)
            self.keys = torch.cat([self.keys, self.draw.numbers[self.draw.rows].double()])

    def _take_positions(self, x: Tensor, draw: PositionDraw) -> None:
        """Add the chosen positions of `x`, (samples, *positions, channels), and keep those with the lowest keys."""
        places = draw.places(x.shape[:-1])
        chosen = x[tuple(index.to(x.device) for index in places.index)]
        samples = torch.cat([*self.samples, self._projected(self._by_unit(chosen, 1))])
        labels = torch.cat([*self.labels, places.labels])
        keys = torch.cat([self.keys, places.keys])
        kept = first_of_each(labels, keys, draw.per_class)
        self.samples, self.labels, self.keys = [samples[kept]], [labels[kept]], keys[kept]

    def keep(self, per_class: int) -> None:
        """Let go of all samples but those of each class with the lowest keys."""
        if self.samples:
            samples, labels = self.stored()
            kept = first_of_each(labels, self.keys, per_class).sort().values
            self.samples, self.labels, self.keys = [samples[kept]], [labels[kept]], self.keys[kept]

    def stored(self) -> tuple[Tensor, Tensor]:
        """All samples (rows, own units, projections) and the classes of their rows."""
        width = min(self.draw.projections, max(s.shape[-1] for s in self.samples))
        parts = [s[..., :width].expand(*s.shape[:2], width) for s in self.samples]  # single positions project on one
        return torch.cat(parts), torch.cat(self.labels)

    def state(self) -> dict[str, Tensor]:
        """What was found so far, by the names in `STATE`."""
        found = self.gathering.state() if self.gathering else {}
        if self.samples:
            samples, labels = self.stored()
            found |= {"samples": samples, "labels": labels, "keys": self.keys}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self.seen = self.draw.batch
        if self.gathering is not None:
            self.gathering.restore(state, self.weight.device)
        if "samples" in state:
            self.samples, self.labels, self.keys = [state["samples"]], [state["labels"]], state["keys"]

    def _sample(self, by_row: Tensor, dim: int) -> Tensor:
        """The projected activations of the drawn rows: (rows, own units, projections)."""
        drawn = self.draw.rows.to(by_row.device)
        chosen = by_row.expand(len(drawn), *by_row.shape[1:]) if self.rows is None else by_row
        if len(drawn) != len(chosen):
            chosen = chosen[drawn % len(chosen)]
        return self._projected(self._by_unit(chosen, dim))

    def _by_unit(self, chosen: Tensor, dim: int) -> Tensor:
        """The values of each own unit along axis 1, whatever positions along axis `dim` it has."""
        spread = chosen.movedim(dim, 1)
        if self.positions is None:
            return spread
        return torch.cat([spread, spread.new_zeros(spread[:, :1].shape)], 1)[:, self.positions.to(chosen.device)]

    def _projected(self, spread: Tensor) -> Tensor:
        """Values (rows, own units, ...) on the seeded directions: (rows, own units, projections)."""
        flat = spread.reshape(len(spread) * len(self.own), -1)
        axes = directions(flat.shape[-1], self.draw.most, seed=self.draw.seed)[:, : self.draw.projections]
        room = self.draw.take(len(flat), axes.shape[1])
        if flat.device == room.device and flat.dtype == room.dtype:
            torch.mm(flat, axes.to(flat.dtype), out=room)
        else:
            room.copy_(flat @ axes.to(flat))
        return room.view(len(spread), len(self.own), -1)


def _place_among(own: Index, units: Index) -> Index:
    """The place of each position's unit among the own ones; one behind the last where it has none."""
    return np.where(units < 0, len(own), np.searchsorted(own, units))


def _positions(units: Index) -> tuple[Index, Tensor | None]:
    """The units of an edge in order, and the positions of each, padded with -1; None where position i is unit i."""
    own, inverse, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    table = np.full((len(own), counts.max()), -1, dtype=np.int64)
    column = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[inverse[order], column] = order
    if own[0] < 0:
        own, table = own[1:], table[1:]
    if table.shape == (len(units), 1) and np.array_equal(table[:, 0], np.arange(len(units))):
        return own, None
    return own, torch.from_numpy(table)


def rows_of(graph: ModelGraph) -> dict[str, Rows | None]:
    """Where the samples of a batch lie in what every node gives, by its shapes on one sample and on two.

    Nodes are left out for which they do not tell.
    """
    one, two = (pytree.tree_map_only(Tensor, partial(_samples, count=n), example_of(graph)) for n in (1, 2))
    try:
        specs = [facts_on(graph, example).specs for example in (one, two)]
    except Exception:  # noqa: BLE001 - a model that does not run on one sample has its samples along the first axis
        return {}
    found: dict[str, Rows | None] = {}
    for name, spec in specs[0].items():
        other = specs[1][name]
        if type(spec) is TensorSpec and type(other) is TensorSpec and len(spec.shape) == len(other.shape):
            changed = [axis for axis, (a, b) in enumerate(zip(spec.shape, other.shape, strict=True)) if a != b]
            if len(changed) <= 1:
                found[name] = Rows(changed[0], spec.shape[changed[0]]) if changed else None
    return found


def _samples(x: Tensor, *, count: int) -> Tensor:
    """The first `count` rows of a tensor, repeated where it has fewer."""
    return x[torch.arange(count, device=x.device) % len(x)] if is_dense(x) and x.ndim and len(x) else x
