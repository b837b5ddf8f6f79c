"""Original and rewritten graph in lockstep over the calibration batches, and rows sampled of what a layer does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.coupling.readers import Reader
from fxprune.recovery.compensation.aims import Aim
from fxprune.recovery.compensation.calibration import Calibration
from fxprune.recovery.compensation.least_squares import Rectified, Rows
from fxprune.recovery.compensation.lockstep import Stepper
from fxprune.rewriting.remaining import Checker, narrow
from fxprune.rules.labels import Labels
from fxprune.scoring.probes import Rows as Samples

ROWS_A_FEATURE = 24
FEWEST_ROWS, MOST_ROWS = 8192, 32768
MOST_NUMBERS = 1 << 26  # rows times features
FEWEST_PLACES = 4  # of a sample, where there are more samples than rows


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The runs of the original graph and of the rewritten one, and what stays of the original's values."""

    whole: Stepper
    small: Stepper
    checker: Checker
    data: Calibration
    draw: torch.Generator

    def source(self, node: fx.Node) -> fx.Node:
        """What a layer of the rewritten graph reads first."""
        found = node.args[0] if node.args else node.kwargs["input"]
        return found if isinstance(found, fx.Node) else node.all_input_nodes[0]

    def is_narrowed(self, node: fx.Node) -> bool:
        """Whether something is missing from what a node of the rewritten graph reads."""
        original = self.whole.by_name.get(node.name)
        values = [] if original is None else [self.checker.old.get(s.name) for s in original.all_input_nodes]
        return any(not bool(mask.all()) for x in values if isinstance(x, Labels) for mask in self.checker.masks(x))

    def stays(self, name: str) -> list[Tensor | None]:
        """For every axis of what a node of the original gives, which of its indices stay."""
        value = self.checker.old.get(name)
        return [*self.checker.masks(value)] if isinstance(value, Labels) else []

    def passed(self, node: fx.Node) -> None:
        """Go on past a node of the rewritten graph, and let go of what lies behind it in both."""
        self.small.passed(node)
        if node.name in self.whole.by_name:
            self.whole.passed(self.whole.by_name[node.name])

    def rows(self, node: fx.Node, reader: Reader, aim: Aim, most: int) -> tuple[Rows, Rectified | None] | None:
        """Sampled inputs of a layer and the outputs wanted there, and what rectifies them.

        None where the two do not fit together, or where none or all of the rows are held out.
        """
        masks, original = self.stays(aim.node.name), self.whole.to(self.whole.by_name[aim.node.name])
        wanted = [narrow(y, masks) for y in original]
        given = self.small.to(self.source(node))
        if not all(_fit(x, y, reader) for x, y in zip(given, wanted, strict=True)):
            return None
        others = None if aim.other is None else self.small.values[aim.other]
        axis = self.samples_axis(node.name, reader, wanted[0])
        picks = picks_of([grid(y, reader, axis).shape[:2] for y in wanted], self.own(most), self.draw)
        parts = []
        for batch, (x, y, pick) in enumerate(zip(given, wanted, picks, strict=True)):
            goal = pick.of(grid(y, reader, axis))
            other = torch.zeros_like(goal)
            if others is not None:
                other = pick.of(grid(others[batch].expand_as(y), reader, axis))
            held = pick.of(self.held(node.name, y, batch, reader, axis))
            parts.append((pick.inputs(x, y, reader, axis), goal, other, held))
        x, goal, other, held = (self.data.gathered(torch.cat(column)) for column in zip(*parts, strict=True))
        return _aimed(x, precise(goal), precise(other), held[:, 0], reader, aim)

    def own(self, rows: int) -> int:
        """How many of so many rows this rank samples."""
        return math.ceil(rows / self.data.ranks)

    def samples_axis(self, name: str, reader: Reader, output: Tensor) -> int:
        """The axis of the samples in what a linear layer gives; that of a convolution is the first."""
        samples = self.data.samples.get(name, Samples()) or Samples()
        return samples.axis if reader.windows is None and samples.axis < output.ndim - 1 else 0

    def held(self, name: str, output: Tensor, batch: int, reader: Reader, axis: int) -> Tensor:
        """Which rows of a grid are held out: (n, places, 1)."""
        mask = self.data.mask(name, output, batch, reader.channel_axis)
        return grid(mask.expand(output.narrow(reader.channel_axis, 0, 1).shape), reader, axis)


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """Indices into the first two axes of a grid."""

    first: Tensor
    places: Tensor

    def of(self, values: Tensor) -> Tensor:
        """The rows (n, channels) of a grid (first, places, channels)."""
        first, places = self.first.to(values.device), self.places.to(values.device)
        rows: Tensor = values[first[:, None], places]
        return rows.flatten(0, 1)

    def inputs(self, x: Tensor, output: Tensor, reader: Reader, axis: int) -> Tensor:
        """What the layer reads there: (n, groups, features)."""
        if reader.windows is None:
            return precise(self.of(grid(x, reader, axis))[:, None])
        batched, positions = _batched(x, reader)[self.first.to(x.device)], output.shape[-reader.windows.nd :]
        values = precise(reader.windows.values(batched, self.places, positions))
        rows: Tensor = values.unflatten(1, (reader.groups, -1)).permute(0, 3, 1, 2, 4)
        return rows.flatten(3).flatten(0, 1)


def rows_for(features: int, groups: int = 1) -> int:
    """How many rows to sample for a layer of so many features a group."""
    return max(1, min(max(ROWS_A_FEATURE * features, FEWEST_ROWS), MOST_ROWS, MOST_NUMBERS // (features * groups)))


def picks_of(sizes: Sequence[Sequence[int]], most: int, draw: torch.Generator) -> list[Pick]:
    """Of grids of sizes (first, places), about `most` of all rows, evenly; the same places of all of a batch."""
    share = most / max(1, sum(first * places for first, places in sizes))
    picks = []
    for first, places in sizes:
        rows = math.ceil(first * places * share)
        few = min(places, max(FEWEST_PLACES, math.ceil(rows / max(first, 1))))
        picks.append(Pick(*(_some(n, k, draw) for n, k in ((first, math.ceil(rows / max(few, 1))), (places, few)))))
    return picks


def _some(count: int, few: int, draw: torch.Generator) -> Tensor:
    """So many of the numbers below `count`, in order; all of them where they are no more than that."""
    return torch.arange(count) if few >= count else torch.randperm(count, generator=draw)[:few].sort().values


def grid(values: Tensor, reader: Reader, axis: int) -> Tensor:
    """What a layer reads or gives as (first, places, channels): samples along the first axis, positions then."""
    if reader.windows is not None:
        return _batched(values, reader).flatten(2).movedim(1, 2)
    values = values if values.ndim > 1 else values[None]
    moved = values.movedim(axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:-1]), moved.shape[-1])


def _batched(x: Tensor, reader: Reader) -> Tensor:
    return x[None] if reader.windows is not None and x.ndim == reader.windows.nd + 1 else x


def _fit(x: Any, y: Any, reader: Reader) -> bool:
    """Whether a layer reads and gives values of such shapes."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != y.ndim:
        return False
    groups, outputs, inputs, _ = reader.matrix().shape
    channels = x.shape[reader.channel_axis], y.shape[reader.channel_axis]
    return channels == (groups * inputs, groups * outputs) and (
        reader.windows is not None or x.shape[:-1] == y.shape[:-1]
    )


def _aimed(
    x: Tensor, goal: Tensor, other: Tensor, held: Tensor, reader: Reader, aim: Aim
) -> tuple[Rows, Rectified | None] | None:
    """The rows of a layer, from what is wanted behind what follows it."""
    if bool(held.all()) or not bool(held.any()):
        return None
    scale, shift = aim.scale_and_shift(goal)
    safe = torch.where(scale.abs() > 1e-6, scale, torch.full_like(scale, torch.inf))
    rows = Rows(x.movedim(1, 0), by_group((goal - other - shift) / safe, reader.groups), held)
    if not aim.rectified:
        return rows, None
    return rows, Rectified(by_group(scale, reader.groups), by_group(shift + other, reader.groups))


def by_group(values: Tensor, groups: int) -> Tensor:
    """(rows, channels) as (groups, rows, channels a group)."""
    grouped: Tensor = values.unflatten(1, (groups, -1))
    return grouped.movedim(1, 0)


def precise(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if x.dtype == torch.float64 else x.float()
