"""Entries that are written, added or looked up at computed places of one axis: the channels of other axes pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune.rules.choices import apart
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.movement import assign, move
from fxprune.rules.table import rule, takes_index
from fxprune.rules.vocabulary import INDEX_SELECT

_ZEROS = frozenset({torch.zeros, torch.zeros_like, "new_zeros"})


@rule("scatter", "scatter_add", "scatter_reduce", "scatter_", "scatter_add_", "scatter_reduce_")
@rule(torch.scatter, torch.scatter_add, torch.scatter_reduce)
@takes_index
def scatter(ctx: Context, x: Labels, dim: int, index: Labels, *args: Any, **kwargs: Any) -> Labels:
    """The places along `dim` are computed; along every other axis the tensors meet.

    Where they are the numbers of experts, the axis is theirs: of zeros, a place is another number only in rows that
    have chosen its expert.
    """
    rest = apart(ctx, x, dim % x.ndim, index)
    if index.index_of is not None and rest is not x:
        ctx.choose_by_number(index.index_of)  # in zeros like the scores, too
        source = ctx.source(x)
        if source is not None and source.target in _ZEROS:
            ctx.mark_numbers(ctx.vector(x, dim % x.ndim), index.index_of)
    planes = _met_beside(ctx, dim, rest, index, *labels_in((args, kwargs)))
    return Labels(x.shape, planes if rest is x else (*x.along(dim % x.ndim), *planes))


@rule("index_add", "index_copy", "index_reduce", "index_fill", "index_add_", "index_copy_", "index_reduce_")
@rule("index_fill_", torch.index_add, torch.index_copy, torch.index_reduce, torch.index_fill)
def index_add(ctx: Context, x: Labels, dim: int, index: Labels, *args: Any, **kwargs: Any) -> Labels:
    """As `scatter`, with one number for each slice along `dim`."""
    _freeze(ctx, index.planes)
    return Labels(x.shape, _met_beside(ctx, dim, x, *labels_in((args, kwargs))))


@rule("index_put", "index_put_", torch.index_put)
def index_put(ctx: Context, x: Labels, indices: Sequence[Any], values: Labels, *args: Any, **kwargs: Any) -> Labels:
    """As an assignment to `x[indices]`."""
    assign(ctx, x, tuple(slice(None) if index is None else index for index in indices), values)
    return Labels(x.shape, x.planes)


@rule(torch.gather, "gather", torch.take_along_dim, "take_along_dim")
@takes_index
def gather(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """Known places are a data movement; computed ones are those of an axis without channels."""
    index, dim = labels_in((args, kwargs))[0], ctx.call.get("dim")
    if index.value is not None and not index.planes:
        return move(ctx, x, *args, **kwargs)
    if dim is None:
        return ctx.opaque(f"picked by a computed index in {ctx.describe()}", x, index)
    x = apart(ctx, x, dim % x.ndim, index)
    planes = _met_beside(ctx, dim, x, index, broadcast="along" in str(ctx.node.target))
    sizes = {axis: plane.core.shape[axis] for plane in planes for axis in plane.axes}
    return Labels(tuple(sizes.get(axis, size) for axis, size in enumerate(ctx.spec().shape)), planes)


@rule("index_select", *INDEX_SELECT)
@takes_index
def index_select(ctx: Context, x: Labels, dim: int, index: Labels) -> Any:
    """As `gather`, with one number for each slice along `dim`."""
    if index.value is not None and not index.planes:
        return move(ctx, x, dim, index)
    dim = dim % x.ndim
    x = apart(ctx, x, dim, index)
    _freeze(ctx, (*index.planes, *x.along(dim)))
    return Labels((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]), x.beside(dim))


@rule(torch.segment_reduce)
def segment_reduce(ctx: Context, data: Labels, reduce: str, *args: Any, **kwargs: Any) -> Labels:
    """Segments of one axis are reduced, every channel by itself."""
    axis = int(ctx.call.get("axis")) % data.ndim
    _freeze(ctx, data.along(axis))
    return Labels((*data.shape[:axis], ctx.spec().shape[axis], *data.shape[axis + 1 :]), data.beside(axis))


@rule("masked_scatter", "masked_scatter_", torch.masked_scatter, "masked_select", torch.masked_select)
@rule("take", torch.take, "put_")
def in_order(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Entries are counted over all axes: without some channels others would be hit."""
    return ctx.opaque(f"counted over all axes by {ctx.describe()}", args, kwargs)


def _met_beside(ctx: Context, dim: int, *tensors: Labels, broadcast: bool = False) -> tuple[Plane, ...]:
    """The common planes of tensors beside axis `dim`; those along it, or along axes of several lengths, are frozen."""
    given = [x for x in tensors if x.ndim]
    axes = range(given[0].ndim)
    lengths = [{x.shape[axis] for x in given} - ({1} if broadcast else set()) for axis in axes]
    uneven = {axis for axis in axes if len(lengths[axis]) > 1} | {dim % len(axes)}
    for x in given:
        _freeze(ctx, [plane for plane in x.planes if uneven & set(plane.axes)])
    rows = [Labels(tuple(1 if axis in uneven else x.shape[axis] for axis in axes), x.beside(*uneven)) for x in given]
    return ctx.meet(rows, torch.broadcast_shapes(*(row.shape for row in rows))).planes


def _freeze(ctx: Context, planes: Sequence[Plane]) -> None:
    for plane in planes:
        ctx.freeze(plane.core, f"lies along the places that {ctx.describe()} computes")
