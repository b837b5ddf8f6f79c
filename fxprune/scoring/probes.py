"""Probes: the gates of scoring, which take samples, moments and gradients where channels are read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.caller.arrays import Index
from fxprune.coupling.gates import Gate
from fxprune.coupling.groups import Edge
from fxprune.scoring.moments import MomentSums
from fxprune.scoring.position_classes import ClassMap, first_of_each
from fxprune.scoring.sample_axes import SampleAxis
from fxprune.scoring.sampler import Sampler
from fxprune.scoring.signals.separability import directions
from fxprune.scoring.signals.taylor import Through


class Probe(Gate):
    """The gate of one edge: takes samples and moments in the forward pass, the R-Score's sums in the backward pass.

    `weight` is a vector of ones: an entry for each position along the axis, followed by one for each unit of the edge,
    in `own`. The gradient of a position's entry is the derivative of the loss with respect to a factor on the position;
    that of a unit's entry is the sum of the absolute derivatives of the samples' losses. `axis` is that of the samples,
    None where the tensor does not depend on them.
    """

    def __init__(
        self, edge: Edge, sampler: Sampler, device: torch.device, dtype: torch.dtype, axis: SampleAxis | None
    ) -> None:
        super().__init__(edge)
        self.axis, self.sampler = axis, sampler
        self.own, self.positions = _positions(edge.units)
        self.unit_of = None  # the place in `own` of each position's unit, one behind the last where it has none
        if self.positions is not None:
            places = np.where(edge.units < 0, len(self.own), np.searchsorted(self.own, edge.units))
            self.unit_of = torch.from_numpy(places)
        self.weight = nn.Parameter(torch.ones(len(edge.units) + len(self.own), device=device, dtype=dtype))
        self.samples = sampler.edge(len(self.own), dtype)
        self.moment_sums = MomentSums(sampler.seed) if sampler.gathers else None
        self.seen = 0

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        if x.is_complex():  # the real and the imaginary parts are two more places
            return torch.view_as_complex(self(torch.view_as_real(x.resolve_conj()), padded=padded))
        if self.seen < self.sampler.batch:
            self.seen = self.sampler.batch
            self._sample(x.detach())
            if not padded:
                self._gather(x.detach(), self.dim, self.axis)
        return self._through(x, self.dim, self.axis)

    def weigh(self, weight: Tensor) -> Tensor:
        return self._through(weight, 1, None)

    def watch(self, x: Tensor) -> None:
        self._gather(x, x.ndim - 1, None)

    def _through(self, x: Tensor, dim: int, axis: SampleAxis | None) -> Tensor:
        samples, times = None if axis is None else axis.index, 1
        if axis is not None:
            size, count = x.shape[axis.index], len(self.sampler.numbers)
            longer = axis.times > 1 and count and size % count == 0  # sequences may be longer than the example's
            times = size // count if longer else axis.times
            if size % times:
                samples, times = None, 1
        found: Tensor = Through.apply(x, self.weight, dim, self.unit_of, samples, times)  # type: ignore[no-untyped-call]
        return found

    def _gather(self, x: Tensor, dim: int, axis: SampleAxis | None) -> None:
        """Add rows to the moments, by the samples' numbers where `x` has as many samples as there are numbers."""
        numbers = self.sampler.numbers
        if self.moment_sums is None:
            return
        if axis is None or axis.index in (dim, x.ndim) or x.shape[axis.index] != len(numbers) * axis.times:
            self.moment_sums.add(x, dim, batch=int(numbers[0]) if len(numbers) else 0)
        else:
            self.moment_sums.add(*axis.first(x, dim), numbers)

    def _sample(self, x: Tensor) -> None:
        """Store positions where the positions have classes and `x` has the positions; else rows."""
        positions, rows = self.sampler.positions, self.sampler.rows
        if positions is None and not len(rows):
            return  # nothing is compared, so that batches of any length will do
        by_row, dim = (x.unsqueeze(0), self.dim + 1) if self.axis is None else self.axis.first(x, self.dim)
        # Several places of a sample are its flattened steps where it has no other positions; else they are windows.
        aligned = self.axis is not None and dim > 0 and (self.axis.times == 1 or by_row.ndim == 3)
        if positions is not None and aligned and positions.fits(by_row.movedim(dim, -1).shape[:-1]):
            self._sample_positions(by_row.movedim(dim, -1), positions)
        elif len(rows):
            chosen, drawn = by_row, rows.to(by_row.device)
            if self.axis is None:
                chosen = by_row.expand(len(drawn), *by_row.shape[1:])
            if len(drawn) != len(chosen):
                chosen = chosen[drawn % len(chosen)]
            self.samples.add(self._projected(chosen, dim), self.sampler.labels, self.sampler.numbers[rows].double())

    def _sample_positions(self, x: Tensor, positions: ClassMap) -> None:
        """Store the chosen positions of `x`, (samples, *positions, channels), as long as their keys are the lowest."""
        found = positions.positions(x.shape[:-1])
        chosen = x[tuple(index.to(x.device) for index in found.index)]
        self.samples.add(self._projected(chosen, 1), found.labels, found.keys)
        kept = first_of_each(self.samples.labels, self.samples.keys, self.sampler.per_class)
        self.samples.keep(kept, self.sampler.projections)

    def _projected(self, chosen: Tensor, dim: int) -> Tensor:
        """The values of each unit along axis `dim`, on the seeded directions: (rows, own units, projections)."""
        spread = chosen.movedim(dim, 1)
        if self.positions is not None:
            padded = torch.cat([spread, spread.new_zeros(spread[:, :1].shape)], 1)
            spread = padded[:, self.positions.to(chosen.device)]
        flat = spread.reshape(len(spread) * len(self.own), -1)
        axes = directions(flat.shape[-1], self.sampler.most, seed=self.sampler.seed)[:, : self.sampler.projections]
        room = self.sampler.room(len(flat), axes.shape[1])
        if flat.device == room.device and flat.dtype == room.dtype:
            torch.mm(flat, axes.to(flat.dtype), out=room)
        else:
            room.copy_(flat @ axes.to(flat))
        return room.view(len(spread), len(self.own), -1)

    def state(self) -> dict[str, Tensor]:
        """All that was found so far, as named tensors."""
        moments = self.moment_sums.state() if self.moment_sums else {}
        return moments | self.samples.state(self.sampler.projections)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors that `state` gave."""
        self.seen = self.sampler.batch
        if self.moment_sums is not None:
            self.moment_sums.restore(state, self.weight.device)
        self.samples.restore(state)


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
