"""Original and rewritten graph in lockstep over the calibration batches, and sampled inputs and outputs of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.coupling.readers import Reader
from fxprune.recovery.compensation.aims import Aim
from fxprune.recovery.compensation.least_squares import Rectified, Rows
from fxprune.rewriting.remaining import Checker, narrow
from fxprune.rules.labels import Labels
from fxprune.scoring.calibration import Calibration
from fxprune.scoring.lockstep import Stepper
from fxprune.scoring.moments import at_least_float32
from fxprune.scoring.sample_axes import SampleAxis

ROWS_A_FEATURE = 24
FEWEST_ROWS, MOST_ROWS = 8192, 32768
MOST_NUMBERS = 1 << 26  # rows times features, as long as there are at least `FEWEST_A_FEATURE` rows for each
FEWEST_A_FEATURE = 2
FEWEST_PLACES = 4  # of a sample, where there are more samples than rows


@dataclass(frozen=True, slots=True, eq=False)
class GraphPair:
    """The runs of the original and of the rewritten graph, and which channels of the original's values are kept.

    With `all_rows`, a fit is repeated on all samples once the held-out ones have chosen its strength. Without
    `new_biases`, layers that have no bias get none.
    """

    whole: Stepper
    small: Stepper
    checker: Checker
    data: Calibration
    generator: torch.Generator
    all_rows: bool = True
    new_biases: bool = True

    def source(self, node: fx.Node) -> fx.Node:
        """The first input of a layer of the rewritten graph."""
        found = node.args[0] if node.args else node.kwargs["input"]
        return found if isinstance(found, fx.Node) else node.all_input_nodes[0]

    def is_narrowed(self, node: fx.Node) -> bool:
        """Whether an input of a node of the rewritten graph lost channels."""
        original = self.whole.by_name.get(node.name)
        sources = original.all_input_nodes if original else ()
        return any(not bool(mask.all()) for source in sources for mask in self.kept(source.name))

    def kept(self, name: str) -> list[Tensor]:
        """For every axis of the value of a node of the original, a mask of its kept indices."""
        value = self.checker.old.get(name)
        return self.checker.masks(value) if isinstance(value, Labels) else []

    def passed(self, node: fx.Node) -> None:
        """Move on past a node of the rewritten graph, in both graphs."""
        self.small.passed(node)
        if node.name in self.whole.by_name:
            self.whole.passed(self.whole.by_name[node.name])

    def rows(self, node: fx.Node, reader: Reader, aim: Aim, most: int) -> tuple[Rows, Rectified | None] | None:
        """Sampled inputs of a layer, the outputs wanted there, and the rectifier that follows.

        None where the two do not fit together, or where none or all of the rows are held out.
        """
        masks = self.kept(aim.node.name)
        wanted = [narrow(y, masks) for y in self.whole.to(self.whole.by_name[aim.node.name])]
        given = self.small.to(self.source(node))
        if not all(_fit(x, y, reader) for x, y in zip(given, wanted, strict=True)):
            return None
        others = None if aim.other is None else self.small.values[aim.other]
        axis = self.samples_axis(node.name, reader, wanted[0])
        picks = picks_of([grid(y, reader, axis).shape[:2] for y in wanted], self.own(most), self.generator)
        parts = []
        for batch, (x, y, pick) in enumerate(zip(given, wanted, picks, strict=True)):
            goal = pick.of(grid(y, reader, axis))
            other = torch.zeros_like(goal)
            if others is not None:
                other = pick.of(grid(others[batch].expand_as(y), reader, axis))
            held = pick.of(self.held(node.name, y, batch, reader, axis))
            parts.append((pick.inputs(x, y, reader, axis), goal, other, held))
        x, goal, other, held = (self.data.gathered(torch.cat(column)) for column in zip(*parts, strict=True))
        return _aimed(x, at_least_float32(goal), at_least_float32(other), held[:, 0], reader, aim)

    def own(self, rows: int) -> int:
        """The number of rows that this rank samples, of so many."""
        return math.ceil(rows / self.data.ranks)

    def samples_axis(self, name: str, reader: Reader, output: Tensor) -> int:
        """The axis of the samples in the output of a linear layer; the first for convolutions."""
        samples = self.data.samples.get(name, SampleAxis()) or SampleAxis()
        return samples.index if reader.windows is None and samples.index < output.ndim - 1 else 0

    def held(self, name: str, output: Tensor, batch: int, reader: Reader, axis: int) -> Tensor:
        """A mask of the rows of a grid that are held out: (n, places, 1)."""
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
        """The inputs of the layer there: (n, groups, features)."""
        if reader.windows is None:
            return at_least_float32(self.of(grid(x, reader, axis))[:, None])
        batched, positions = _batched(x, reader)[self.first.to(x.device)], output.shape[-reader.windows.nd :]
        values = at_least_float32(reader.windows.values(batched, self.places, positions))
        rows: Tensor = values.unflatten(1, (reader.groups, -1)).permute(0, 3, 1, 2, 4)
        return rows.flatten(3).flatten(0, 1)


def rows_for(features: int, groups: int = 1) -> int:
    """The number of rows to sample for a layer of so many features a group."""
    room = max(MOST_NUMBERS // (features * groups), FEWEST_A_FEATURE * features)
    return max(1, min(max(ROWS_A_FEATURE * features, FEWEST_ROWS), MOST_ROWS, room))


def picks_of(sizes: Sequence[Sequence[int]], most: int, generator: torch.Generator) -> list[Pick]:
    """Indices of about `most` of all rows of grids of sizes (first, places); the same places in all of a batch."""
    share = most / max(1, sum(first * places for first, places in sizes))
    picks = []
    for first, places in sizes:
        rows = math.ceil(first * places * share)
        few = min(places, max(FEWEST_PLACES, math.ceil(rows / max(first, 1))))
        axes = (first, math.ceil(rows / max(few, 1))), (places, few)
        picks.append(Pick(*(_some(count, chosen, generator) for count, chosen in axes)))
    return picks


def _some(count: int, few: int, generator: torch.Generator) -> Tensor:
    """At most so many of the numbers below `count`, in order."""
    return torch.arange(count) if few >= count else torch.randperm(count, generator=generator)[:few].sort().values


def grid(values: Tensor, reader: Reader, axis: int) -> Tensor:
    """Inputs or outputs of a layer as (first, places, channels): samples along the first axis, then positions."""
    if reader.windows is not None:
        return _batched(values, reader).flatten(2).movedim(1, 2)
    values = values if values.ndim > 1 else values[None]
    moved = values.movedim(axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:-1]), moved.shape[-1])


def _batched(x: Tensor, reader: Reader) -> Tensor:
    return x[None] if reader.windows is not None and x.ndim == reader.windows.nd + 1 else x


def _fit(x: Any, y: Any, reader: Reader) -> bool:
    """Whether a layer has inputs and outputs of such shapes."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != y.ndim:
        return False
    groups, outputs, inputs, _ = reader.matrix().shape
    channels = x.shape[reader.channel_axis], y.shape[reader.channel_axis]
    same = reader.windows is not None or x.shape[:-1] == y.shape[:-1]
    return same and channels == (groups * inputs, groups * outputs)


def _aimed(
    x: Tensor, goal: Tensor, other: Tensor, held: Tensor, reader: Reader, aim: Aim
) -> tuple[Rows, Rectified | None] | None:
    """The rows of a layer, from the goal behind the nodes that follow it."""
    if bool(held.all()) or not bool(held.any()):
        return None
    scale, shift = aim.scale_and_shift(goal)
    safe = torch.where(scale.abs() > 1e-6, scale, torch.full_like(scale, torch.inf))

    def by_group(values: Tensor) -> Tensor:  # (rows, channels) as (groups, rows, channels a group)
        return values.unflatten(1, (reader.groups, -1)).movedim(1, 0)  # type: ignore[no-any-return]

    rows = Rows(x.movedim(1, 0), by_group((goal - other - shift) / safe), held)
    return rows, Rectified(by_group(scale), by_group(shift + other)) if aim.rectified else None
