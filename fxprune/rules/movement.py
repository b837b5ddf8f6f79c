"""Data movement: one shared rule runs the operation itself on the labels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.choices import apart
from fxprune.rules.context import Context, grid_options, labels_in
from fxprune.rules.fills import reads_channels
from fxprune.rules.labels import NO_CHANNEL, Labels, Plane, core_of, has_channels, unemptied, varying_axes, vector_plane
from fxprune.rules.picking import BY_INDEX, axes_picked, beside_picked, chosen_as, constant, dtype_of, with_plain_slices
from fxprune.rules.table import rule, takes_index, takes_ragged
from fxprune.rules.vocabulary import Meeting, Slot

_VIEWS = {"view": "reshape", "view_as": "reshape_as"}


def call(node: fx.Node, graph: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    """Run a call node's operation on other arguments; for an assignment to slots, select the slots."""
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    if node.target in BY_INDEX:
        return args[0][args[1]]
    if node.op == "call_method":
        name = _VIEWS.get(str(node.target), str(node.target))  # a view of expanded labels may have to copy
        name = name.rstrip("_") if name in _IN_PLACE else name
        return getattr(args[0], name)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


_IN_PLACE = {"squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}


@rule(
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim,
    torch.moveaxis, torch.squeeze, torch.unsqueeze, torch.t, torch.chunk, torch.split, torch.tensor_split,
    torch.unbind, torch.narrow, torch.select, torch.flip, torch.fliplr, torch.flipud, torch.roll,
    torch.rot90, torch.tile, torch.pixel_shuffle, torch.pixel_unshuffle, F.pixel_shuffle,
    F.pixel_unshuffle, torch.channel_shuffle, F.channel_shuffle, torch.unflatten, torch.ravel,
    torch.hsplit, torch.vsplit, torch.dsplit, torch.split_with_sizes, torch.native_channel_shuffle, operator.getitem,
    "view", "reshape", "flatten", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze",
    "unsqueeze", "t", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "flip", "fliplr",
    "flipud", "roll", "rot90", "tile", "unflatten", "ravel", "view_as", "reshape_as",
    "split_with_sizes", "hsplit", "vsplit", "dsplit", "__getitem__", *_IN_PLACE,
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip
@takes_ragged
@takes_index
def move(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Run the op on the labels of each plane, and on a tensor without labels for the shapes of its results."""
    if ctx.node.op == "call_module":
        args = args[1:]
    x = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(x, Labels):
        return call(ctx.node, ctx.graph, args, kwargs)
    if any(isinstance(value, torch.dtype) for value in args):
        return _bits(ctx, x)
    if ctx.node.target in (operator.getitem, "__getitem__"):
        args = with_plain_slices(ctx, x, args[1])
        x = args[0]
    table = args[1] if len(args) > 1 and isinstance(args[1], Labels) and x.ndim else None
    ctx.freeze_numbered([value for value in labels_in((args, kwargs)) if value is not x and value is not table])
    if table is not None:
        x = apart(ctx, x, 0, table)
        args = (x, *args[1:])
    return _moved(ctx, x, args, kwargs, ctx.spec())


def _moved(ctx: Context, x: Labels, args: Any, kwargs: Any, result: Any) -> Any:
    """`move`; `result` has the shape that the movement had in the example, as far as it is known."""
    others = [value for value in labels_in((args, kwargs)) if value is not x and value.value is None]
    computed = [] if str(ctx.node.target).endswith("_as") else others
    picked = axes_picked(ctx, x, args[1], computed) if computed and ctx.node.target in BY_INDEX else set()
    if picked is None or (computed and not picked):
        return ctx.opaque(f"picked by a computed index in {ctx.describe()}", args, kwargs)
    planes = beside_picked(ctx, x, picked, computed)
    masks = [value for value in computed if dtype_of(ctx, value) is torch.bool]
    numbers = {id(mask): chosen_as(mask, x, args[1], result) for mask in masks}

    def run(tensor: Tensor) -> Any:
        def fill(value: Labels) -> Tensor:
            return tensor if value is x else numbers[id(value)] if id(value) in numbers else constant(value)

        return call(ctx.node, ctx.graph, *pytree.tree_map_only(Labels, fill, (args, kwargs)))

    bare = run(torch.zeros(()).expand(x.shape))
    moved = [pytree.tree_leaves(run(plane.over(x.shape))) for plane in planes]
    if len(planes) == 2 and ctx.remember("joined", int(_flattens(*moved))):
        planes = tuple(filter(None, [_joined(ctx, x, planes)]))
        moved = [pytree.tree_leaves(run(plane.over(x.shape))) for plane in planes]
    ragged = [plane.ragged and _moves_rows(run, x) for plane in planes]
    for plane, by_row in zip(planes, ragged, strict=True):
        if plane.ragged and not by_row:
            ctx.tie(*plane.columns)
    parts = list[Labels]()
    for i, part in enumerate(pytree.tree_leaves(bare)):
        labels = [m[i] for m in moved] if part.numel() else _empty(ctx, planes, x, run, i)
        found = ctx.settle(labels, part.shape, i, ragged=ragged)
        parts.append(found if x.index_of is None else replace(found, index_of=x.index_of))
    return parts[0] if isinstance(bare, Tensor) else tuple(parts)


def _flattens(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two planes lie along one axis of a result, as where heads that share values meet the places in them."""
    return any(set(varying_axes(a)) & set(varying_axes(b)) for a, b in zip(one, other, strict=True))


def _joined(ctx: Context, x: Labels, planes: Sequence[Plane]) -> Plane | None:
    """Two planes as a grid, of which whole slices along an axis of one are removed, or along an axis of the other."""
    axes = tuple(sorted(axis for plane in planes for axis in plane.axes))
    sizes = [[size if axis in plane.axes else 1 for axis, size in enumerate(x.shape)] for plane in planes]
    first = min(planes, key=lambda plane: len(plane.axes)).axes
    met = Meeting(axes, [[plane] for plane in planes], sizes, tag="joined", by_heads=ctx.by_heads, first=first)
    return ctx.merge(met)


def _empty(ctx: Context, planes: Sequence[Plane], x: Labels, run: Callable[[Tensor], Any], part: int) -> list[Tensor]:
    """The labels of a part without elements along its axes that have indices; those across each axis are tied."""
    found = []
    for rows, axis in ((plane.slices(axis), axis) for plane in planes for axis in plane.axes):
        strides = [int(other == axis) for other in range(x.ndim)]
        labels = unemptied(pytree.tree_leaves(run(rows[:, 0].contiguous().as_strided(x.shape, strides)))[part])
        if labels is not None:
            ctx.tie(rows[:, :1], rows)
            found.append(labels)
    return found


def _bits(ctx: Context, x: Labels) -> Any:
    """A view of the bits as another type: numbers keep their channels if both types have the same size."""
    if ctx.spec().dtype.itemsize == ctx.spec(ctx.source(x)).dtype.itemsize:
        return Labels(x.shape, x.planes)
    return ctx.opaque(f"numbers are cut or joined by their bits in {ctx.describe()}", x)


def _moves_rows(run: Callable[[Tensor], Any], x: Labels) -> bool:
    """Whether an operation keeps the last axis of `x` whole, in order, and last."""
    places = torch.arange(x.shape[-1], dtype=torch.float64)
    for result in pytree.tree_leaves(run(places.expand(x.shape))):
        row = core_of(result, (result.ndim - 1,)).reshape(-1)
        if set(varying_axes(result)) - {result.ndim - 1} or len(row) % len(places):
            return False
        if not torch.equal(row, places.repeat(len(row) // len(places))):
            return False
    return True


@rule(operator.setitem)
def assign(ctx: Context, x: Labels, index: Any, value: Any) -> Any:
    """The labels of the slots meet those of the assigned value; the node's value is that of the slots."""
    source = ctx.source(x)
    if x.value is not None and source is not None:
        ctx.env[source] = Labels(x.shape, x.planes)  # its numbers have changed
    region = _moved(ctx, x, (x, index), {}, value)
    if region is None:
        return ctx.opaque(f"assigned at a computed index in {ctx.describe()}", value)
    ctx.meet([region, *labels_in(value)], region.shape)
    return region


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(ctx: Context, tensors: Sequence[Labels], dim: int = 0) -> Labels:
    """Labels are joined along `dim`; along every other axis they meet, as in an element-wise op."""
    tensors = [x for x in tensors if x.shape != (0,)] or tensors  # torch skips these, whatever the rank of the others
    dim = dim % tensors[0].ndim
    whole = [x for x in tensors if x.shape[dim]] or tensors
    for x in (x for x in tensors if not x.shape[dim]):
        for axis in {axis for plane in (*x.planes, *whole[0].planes) for axis in plane.axes} - {dim}:
            ctx.tie(ctx.vector(x, axis), ctx.vector(whole[0], axis))
    rows = [Labels(_with(x.shape, dim, 1), x.beside(dim)) for x in whole]
    across = ctx.meet(rows, rows[0].shape)
    shape = _with(whole[0].shape, dim, sum(x.shape[dim] for x in whole))
    axes = tuple(sorted({dim} | {axis for x in whole for plane in x.along(dim) for axis in plane.axes}))
    core = torch.cat([_spread(ctx, x, dim, axes) for x in whole], dim)
    if not has_channels(core):
        return Labels(shape, across.planes)
    if len(axes) > 1:
        ctx.choose(grid_options(core, axes))
    return Labels(shape, (Plane(core, axes), *across.planes))


def _spread(ctx: Context, x: Labels, dim: int, axes: Sequence[int]) -> Tensor:
    """The labels along `dim` over all of `axes`; -1 where there are none."""
    sizes = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    planes = x.along(dim)
    if len(planes) > 1:
        ctx.vector(x, dim)  # freezes them
    return planes[0].core.expand(sizes) if len(planes) == 1 else torch.full(sizes, NO_CHANNEL, dtype=torch.float64)


@rule(torch.hstack, torch.vstack, torch.dstack, torch.column_stack)
def cat_along(ctx: Context, tensors: Sequence[Labels]) -> Labels:
    """As `cat`, of tensors that have the axis already."""
    name = str(ctx.node.target.__name__)  # type: ignore[union-attr]
    dim = {"hstack": 1, "column_stack": 1, "dstack": 2}.get(name, 0)
    if tensors[0].ndim < max(dim + 1, 2):
        return ctx.opaque(f"{ctx.describe()} adds axes", *tensors)  # type: ignore[no-any-return]
    return cat(ctx, tensors, dim)


@rule(torch.broadcast_tensors)
def broadcast(ctx: Context, *tensors: Any) -> Any:
    """The tensors in one shape, in which they meet."""
    given = labels_in(tensors)
    met = ctx.meet(given, torch.broadcast_shapes(*(x.shape for x in given)))
    return pytree.tree_map_only(TensorSpec, lambda _: met, ctx.spec())


@rule(torch.view_as_real, torch.view_as_complex)
def parts_of_complex(ctx: Context, x: Labels) -> Labels:
    """A last axis of two entries, the real and the imaginary parts, which is added or removed."""
    if ctx.node.target is torch.view_as_real:
        planes = (Plane(plane.core.unsqueeze(-1), plane.axes) for plane in x.planes)
        return Labels((*x.shape, 2), tuple(planes))
    last, kept = x.ndim - 1, []
    for plane in x.planes:
        rest = tuple(axis for axis in plane.axes if axis != last)
        if rest:
            ctx.tie(core_of(plane.core, rest), plane.core)
            kept.append(Plane(plane.core.narrow(last, 0, 1).squeeze(last), rest))
        else:
            ctx.freeze(plane.core, f"is one number for {ctx.describe()}")
    return Labels(x.shape[:-1], tuple(kept))


@rule(torch.stack)
def stack(ctx: Context, tensors: Sequence[Labels], dim: int = 0) -> Labels:
    """The inputs meet; the new axis carries no labels."""
    met = ctx.meet(tensors, tensors[0].shape)
    dim = dim % (met.ndim + 1)
    planes = [plane.over(met.shape).unsqueeze(dim) for plane in met.planes]
    return ctx.settle(planes, (*met.shape[:dim], len(tensors), *met.shape[dim:]))


@rule(F.pad, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def pad(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Padding along an axis of channels adds channels; along any other axis it belongs to the channel."""
    x, amounts, mode = pad_arguments(ctx.graph, ctx.node, args, kwargs)
    shape, planes = list(x.shape), list(x.planes)
    for dim, (before, after) in amounts.items():
        if before is None or after is None:
            if x.along(dim):
                return ctx.opaque(f"{ctx.describe()} pads channels by computed amounts", x)
            shape[dim] = ctx.spec().shape[dim]
            continue
        shape[dim] += before + after
        if not x.along(dim) or ((before, after) == (0, 0) and mode == "constant"):
            continue
        if mode != "constant" or min(before, after) < 0:
            return ctx.opaque(f"{mode} padding or cropping of an axis of channels in {ctx.describe()}", x)
        inner = ctx.vector(x, dim)
        first = ctx.fresh(Slot(ctx.node.name, f"before{dim}"), before)
        last = ctx.fresh(Slot(ctx.node.name, f"after{dim}"), after)
        planes = [plane for plane in planes if dim not in plane.axes]
        planes.append(vector_plane(torch.cat([first, inner, last]), dim, x.ndim))
    return Labels(tuple(shape), tuple(planes))


def pad_arguments(
    graph: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any
) -> tuple[Labels, dict[int, tuple[int | None, int | None]], str]:
    """The input, the (before, after) amounts of every padded axis (None: computed), and the mode of a padding node."""
    if node.op == "call_module":
        module: Any = graph.get_submodule(str(node.target))
        x, flat, mode = args[-1], module.padding, "constant"
    else:
        given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
        x, flat, mode = given["input"], given["pad"], given.get("mode", "constant")
    numbers = [value.value if isinstance(value, Labels) else value for value in flat]
    amounts = [None if number is None else int(number) for number in numbers]
    return x, {x.ndim - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}, mode


@rule(torch.tril, torch.triu, "tril", "triu", "tril_", "triu_")
def triangle(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """The last two axes must have no channels, because removed channels would move the diagonal."""
    x = labels_in((args, kwargs))[0]
    if x.along(x.ndim - 1) or x.along(x.ndim - 2):
        return ctx.opaque(f"a triangle over an axis of channels in {ctx.describe()}", x)
    return Labels(x.shape, x.planes)


@rule("expand", "expand_as", "broadcast_to", torch.broadcast_to, torch.expand_copy)
def expand(ctx: Context, x: Labels, *size: Any, **kwargs: Any) -> Labels:
    """Labels are kept; an axis that is expanded to the channels of another tensor gets that tensor's labels.

    An axis that is expanded to a literal size gets labels of its own, because these may be heads.
    """
    like = size[0] if size and isinstance(size[0], Labels) else None
    blank = pytree.tree_map_only(Labels, lambda value: torch.zeros(()).expand(value.shape), ((x, *size), kwargs))
    bare = call(ctx.node, ctx.graph, *blank)
    by = len(bare.shape) - x.ndim
    own = Labels(tuple(bare.shape), tuple(plane.shifted(by) for plane in x.planes))
    sizes = (1,) * by + x.shape
    if like is None:
        return Labels(own.shape, own.planes + tuple(_literal_axes(ctx, x, own.shape, sizes)))
    taken = {axis for plane in own.planes for axis in plane.axes}
    spread = (p for p in like.planes if all(sizes[axis] == 1 and axis not in taken for axis in p.axes))
    return Labels(own.shape, own.planes + tuple(spread))


def _literal_axes(ctx: Context, x: Labels, shape: Sequence[int], before: Sequence[int]) -> Iterator[Plane]:
    """Labels for the axes after the first that `expand` expands to a number in the code, or to that of channels."""
    given: Any = ctx.node.kwargs.get("size", ctx.node.args[1:])
    flat = given[0] if isinstance(given, tuple) and len(given) == 1 else given
    grouped = any(len(plane.axes) > 1 for plane in x.planes)
    if (grouped and not ctx.remember("queries", int(ctx.query_heads))) or not isinstance(flat, (tuple, list)):
        return
    for axis, number in tuple(enumerate(flat))[1:]:
        named = reads_channels(ctx, number) if isinstance(number, fx.Node) else isinstance(number, int) and number > 0
        if ctx.remember(f"spread{axis}", shape[axis] if named and before[axis] == 1 else 1) > 1:
            labels = ctx.fresh(Slot(ctx.node.name, f"spread{axis}"), shape[axis])
            yield vector_plane(labels, axis, len(shape))


@rule("repeat")
def repeat(ctx: Context, x: Labels, *counts: Any) -> Labels:
    """A data movement; an axis of one entry that is repeated is as one that is expanded."""
    moved: Labels = move(ctx, x, *counts)
    sizes = (1,) * (moved.ndim - x.ndim) + x.shape
    return Labels(moved.shape, moved.planes + tuple(_literal_axes(ctx, x, moved.shape, sizes)), single=moved.single)


@rule("repeat_interleave", torch.repeat_interleave)
def repeat_interleave(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """A data movement; an axis of one entry that is repeated, such as a head for all others, gets labels of its own."""
    moved: Labels = move(ctx, x, *args, **kwargs)
    dim = ctx.call.get("dim")
    dim = None if dim is None else dim % x.ndim
    if not dim or ctx.remember("spread", moved.shape[dim] if x.shape[dim] == 1 else 1) == 1:
        return moved
    labels = ctx.fresh(Slot(ctx.node.name, "spread"), moved.shape[dim])
    return Labels(moved.shape, (*moved.planes, vector_plane(labels, dim, moved.ndim)), single=moved.single)


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
