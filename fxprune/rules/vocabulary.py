"""The terms of rules: slots, meetings of planes, options to choose from, and channel reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune.rules.labels import Plane

CASTS = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte",
    "contiguous", "clone", "detach",
)  # fmt: skip
FILLS = frozenset({
    torch.zeros, torch.ones, torch.empty, torch.full, "new_zeros", "new_ones", "new_empty", "new_full",
})  # fmt: skip
LIKES = frozenset({torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like})
INDEX_SELECT = frozenset({torch.index_select, torch._C._VariableFunctions.index_select})  # some libraries replace it
GIVEN_UP = "given up"  # remembered of nodes that are handled as if their operation had no rule


@dataclass(frozen=True, slots=True)
class Slot:
    """One axis of a parameter, or a tagged axis that an operation creates, such as padding."""

    owner: str
    axis: int | str


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """Overlapping planes of several inputs, aligned to one rank, and the union of their axes.

    `inputs` holds all planes of each input, also those outside `axes`, and `sizes` its shape. `summed` are axes that
    the node sums over, and `tag` names the labels of the result. `by_heads` says whether the axes of a grid that
    several inputs share are tried first (heads) or last (places in heads); None chooses the axis that frees more units.
    The axes `first` always come first. With `coarse`, as for a very large grid, the result has labels only along the
    axes that all planes share.
    """

    axes: tuple[int, ...]
    inputs: Sequence[Sequence[Plane]]
    sizes: Sequence[Sequence[int]]
    summed: frozenset[int] = frozenset()
    tag: str = ""
    by_heads: bool | None = None
    first: tuple[int, ...] = ()
    coarse: bool = False

    @property
    def grid(self) -> dict[int, int]:
        """The axes, and the number of indices along each."""
        return {axis: max(plane.core.shape[axis] for plane in self.planes) for axis in self.axes}

    @property
    def planes(self) -> list[Plane]:
        """The planes that meet."""
        return [plane for planes in self.inputs for plane in planes if set(plane.axes) <= set(self.axes)]

    def result_axes(self) -> tuple[int, ...]:
        """The axes over which the result has labels: all that are not summed, or of these the shared ones."""
        shared = set(self.axes)
        if self.coarse:
            shared = set.intersection(*(set(plane.axes) for plane in self.planes))
        return tuple(axis for axis in self.axes if axis in shared - self.summed)

    def may_be_removed(self, axis: int) -> bool:
        """Whether indices along `axis` can be removed: each input that is wider than 1 there has one plane along it."""
        labelled = [sum(axis in plane.axes for plane in planes) for planes in self.inputs]
        wide = [size[axis] != 1 for size in self.sizes]
        return all(count == 1 or not (count or is_wide) for count, is_wide in zip(labelled, wide, strict=True)) and (
            axis in self.summed or axis in self.result_axes()
        )

    def order(self) -> list[int]:
        """The axes, with heads first or last as `by_heads` says."""
        heads = {axis for axis in self.axes if sum(axis in plane.axes for plane in self.planes) > 1}
        if self.summed & set(self.axes):
            heads = set(self.axes) - self.summed

        def late(axis: int) -> tuple[bool, bool]:
            return axis not in self.first, self.by_heads is not None and (axis in heads) != self.by_heads

        return sorted(self.axes, key=late)


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to keep a grid rectangular: pairs of label vectors to tie, and labels that then have to be kept."""

    ties: tuple[tuple[Tensor, Tensor], ...]
    kept: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRead:
    """Node `consumer` reads the channels `labels` along axis `dim` of the value of node `source`.

    `through` are the labels into which each channel is turned, if it is turned into one only; where these are tied to
    `labels`, as in a depthwise convolution, the channel passes and is read further on. `across` (channels, n) are the
    labels in the slice of each channel of a grid: slices along this axis are removed only if they are tied to `labels`.
    `parameter` names the module's own parameter whose columns read them inside the module. Where `chosen` names a node,
    `labels` are those of experts: the rows of `source` are their outputs, and that node's numbers say which expert gave
    each.
    """

    consumer: str
    source: str
    dim: int
    labels: Tensor
    through: Tensor | None = None
    across: Tensor | None = None
    parameter: str | None = None
    chosen: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Node `consumer` compares the channels `labels` along axis `dim` of the value of node `source`.

    Where they are experts, a removed one is read as minus infinity, and `least` of them are kept, because so many are
    chosen. Other channels are kept, for a `reason`; `statistic` says that they may be removed inexactly.
    """

    consumer: fx.Node
    source: fx.Node
    dim: int
    labels: Tensor
    reason: str
    least: int = 1
    statistic: bool = False
