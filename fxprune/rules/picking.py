"""Indices and masks that are computed from the input: the axes that they pick from, and stand-ins for them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane

BY_INDEX = (operator.getitem, "__getitem__", operator.setitem, "index_put", "index_put_", torch.index_put)


def axes_picked(ctx: Context, x: Labels, index: Any, computed: Sequence[Labels]) -> set[int] | None:
    """The axes along which computed indices, or one computed mask, pick; None where they are used in another way."""
    entries = index if isinstance(index, tuple) else (index,)
    widths = [_axes_taken(ctx, entry) for entry in entries]
    picked, axis = set[int](), 0
    for entry, width in zip(entries, widths, strict=True):
        axis += x.ndim - sum(widths) if entry is Ellipsis else 0
        if any(entry is value for value in computed):
            picked |= {*range(axis, axis + width)}
        axis += width
    masks = sum(dtype_of(ctx, value) is torch.bool for value in computed)
    known = all(any(entry is value for entry in entries) for value in computed)
    return picked if known and masks < 2 else None


def with_plain_slices(ctx: Context, x: Labels, index: Any) -> tuple[Labels, Any]:
    """`x`, and an index without computed bounds of slices; the channels along an axis that these cut are kept."""
    entries, plain = index if isinstance(index, tuple) else (index,), []
    for place, entry in enumerate(entries):
        bounds = labels_in((entry.start, entry.stop, entry.step)) if isinstance(entry, slice) else []
        if bounds:
            behind = any(other is Ellipsis for other in entries[:place])
            others = [other for other in (entries[place + 1 :] if behind else entries[:place]) if other is not Ellipsis]
            axis, out = sum(_axes_taken(ctx, e) for e in others), sum(not isinstance(e, int) for e in others)
            axis, out = (x.ndim - 1 - axis, len(ctx.spec().shape) - 1 - out) if behind else (axis, out)
            x = replace(x, planes=beside_picked(ctx, x, {axis}, bounds))
            entry = slice(0, ctx.spec().shape[out])  # noqa: PLW2901 - of the size that the example had
        plain.append(entry)
    return x, tuple(plain) if isinstance(index, tuple) else plain[0]


def _axes_taken(ctx: Context, entry: Any) -> int:
    """How many axes an entry of an index takes."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Labels) and dtype_of(ctx, entry) is torch.bool else 1


def dtype_of(ctx: Context, x: Labels) -> torch.dtype | None:
    """The dtype of an input of the current node."""
    source = ctx.source(x)
    return ctx.spec(source).dtype if source is not None else None if x.value is None else x.value.dtype


def chosen_as(mask: Labels, x: Labels, index: Any, result: Any) -> Tensor:
    """A mask in the place of a computed one, that chooses as many places as that did for a `result` of its shape."""

    def trial(count: int) -> Tensor:
        return (torch.arange(math.prod(mask.shape)) < count).reshape(mask.shape)

    def shape(count: int) -> torch.Size:
        chosen = pytree.tree_map_only(Labels, lambda v: trial(count) if v is mask else constant(v), index)
        return torch.zeros(()).expand(x.shape)[chosen].shape

    none, one = shape(0), shape(1)
    place = next((axis - len(one) for axis in range(len(one)) if none[axis] != one[axis]), None)
    if place is None or not isinstance(result, (TensorSpec, Labels)) or len(result.shape) < -place:
        return trial(1)
    return trial(result.shape[place])


def beside_picked(ctx: Context, x: Labels, picked: set[int], computed: Sequence[Labels]) -> tuple[Plane, ...]:
    """The planes beside the axes that computed indices pick from; others, and those of the indices, are frozen."""
    for plane in (*x.planes, *(plane for index in computed for plane in index.planes)):
        if picked & set(plane.axes) or plane not in x.planes:
            ctx.freeze(plane.core, f"picked by a computed index in {ctx.describe()}")
    return x.beside(*picked)


def constant(value: Labels) -> Tensor:
    """The numbers of a constant such as an index, or zeros of its shape."""
    return torch.zeros((), dtype=torch.int64).expand(value.shape) if value.value is None else value.value.cpu()
