"""The terms in which rules state what they find: slots, meetings, options and readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxprune.rules.labels import Plane


@dataclass(frozen=True, slots=True)
class Slot:
    """One axis of a parameter, or a tagged axis that an operation makes by itself (padding, say)."""

    owner: str
    axis: int | str


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """Planes that overlap, of several inputs that were aligned to one rank, and the axes that they take in all.

    `inputs` holds the planes of each input, those outside `axes` too, and `sizes` its sizes. `summed` are axes that the
    node sums over, and `tag` names what is left of them. `by_heads` says whether, of a grid, the axes that several
    inputs share should go first (heads) or last (the places in every head); None leaves it to what frees more.
    """

    axes: tuple[int, ...]
    inputs: Sequence[Sequence[Plane]]
    sizes: Sequence[Sequence[int]]
    summed: frozenset[int] = frozenset()
    tag: str = ""
    by_heads: bool | None = None

    @property
    def planes(self) -> list[Plane]:
        """The planes that meet."""
        return [plane for planes in self.inputs for plane in planes if set(plane.axes) <= set(self.axes)]

    def left(self) -> tuple[int, ...]:
        """The axes over which the result has labels: all that stay, or those that every plane has."""
        shared = set(self.axes)
        if not any(plane.axes == self.axes for plane in self.planes):
            shared = set.intersection(*(set(plane.axes) for plane in self.planes))
        return tuple(axis for axis in self.axes if axis in shared - self.summed)

    def may_go(self, axis: int) -> bool:
        """Whether indices along `axis` can leave: every input that is spread along it has one set of labels there."""
        labelled = [sum(axis in plane.axes for plane in planes) for planes in self.inputs]
        wide = [size[axis] != 1 for size in self.sizes]
        return all(count == 1 or not (count or is_wide) for count, is_wide in zip(labelled, wide, strict=True)) and (
            axis in self.summed or axis in self.left()
        )

    def order(self) -> list[int]:
        """The axes, heads first or last where that was asked."""
        heads = {axis for axis in self.axes if sum(axis in plane.axes for plane in self.planes) > 1}
        if self.summed & set(self.axes):
            heads = set(self.axes) - self.summed
        return sorted(self.axes, key=lambda axis: self.by_heads is not None and (axis in heads) != self.by_heads)


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to keep a grid rectangular: pairs of label vectors to tie, and labels that then have to stay."""

    ties: tuple[tuple[Tensor, Tensor], ...]
    stays: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRead:
    """Node `consumer` reads the channels `labels` along axis `dim` of what node `source` gives.

    `through` are the labels that each of them is turned into, where a channel is turned into one alone; where these
    are tied to `labels`, as in a depthwise convolution, the channel only passes and is read further on. `across`
    (channels, n) are all that lie in the slice of each, where the axis is that of a grid: only if they are tied to
    `labels` do slices along this axis leave. `parameter` names the parameter of the module at hand whose columns read
    them inside the module.
    """

    consumer: str
    source: str
    dim: int
    labels: Tensor
    through: Tensor | None = None
    across: Tensor | None = None
    parameter: str | None = None
