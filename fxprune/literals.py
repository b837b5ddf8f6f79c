"""Mending by numbers: new literals in the calls that name the sizes of channels, or numbers that follow from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxprune.mending import PERMUTE, Repair, index_node, mends, preserves, restore
from fxprune.originals import SHARE
from fxprune.rules import movement


@preserves(F.scaled_dot_product_attention)
def scale(repair: Repair) -> None:
    """The scale follows from the size of a head in the original."""
    before = repair.old[repair.source.name].shape[-1]
    if repair.node.kwargs.get("scale") is None and repair.env[repair.source].shape[-1] != before:
        repair.node.kwargs = dict(repair.node.kwargs) | {"scale": before**-0.5}


@preserves(torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full)
def number_as_tensor(repair: Repair) -> None:
    """A number that was read from a size and becomes a tensor stays the original's."""
    restore(repair)


@preserves(F.group_norm, torch.group_norm)
def groups_of_norm(repair: Repair) -> None:
    """Groups keep their size, where there are several."""
    now, before = repair.env[repair.source].shape[1], repair.old[repair.source.name].shape[1]
    count = _argument(repair, 1, "num_groups", lambda n: repair.old[n.name])
    if now != before and count != 1:
        _set_argument(repair, 1, "num_groups", now // (before // count))


@preserves(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def normalized_shape(repair: Repair) -> None:
    """The last axes of the input."""
    now, named = repair.env[repair.source].shape, _argument(repair, 1, "normalized_shape", lambda n: repair.old[n.name])
    if now != repair.old[repair.source.name].shape:
        _set_argument(repair, 1, "normalized_shape", tuple(now[len(now) - len(named) :]))


def _argument(repair: Repair, place: int, name: str, value: Callable[[fx.Node], Any]) -> Any:
    """An argument of the node, which it has by position or by name, with values in the place of nodes."""
    given = repair.node.kwargs[name] if name in repair.node.kwargs else repair.node.args[place]
    return map_arg(given, value)


def _set_argument(repair: Repair, place: int, name: str, value: Any) -> None:
    """Give the node another argument where it had it, unless it reads the same from a tensor already."""
    node = repair.node
    if _argument(repair, place, name, repair.env.get) == value:
        return
    if name in node.kwargs:
        node.kwargs = dict(node.kwargs) | {name: value}
    else:
        node.update_arg(place, value)


@mends("view_as", "reshape_as", "expand_as")
def shape_of_another(repair: Repair) -> None:
    """The other tensor, whose shape is taken, is cut to the shape that is wanted."""
    node, other = repair.node, repair.node.args[1]
    sizes, wanted = repair.env[other].shape, repair.expected.shape
    for axis, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
        if size != want:
            buffer = index_node(repair, torch.arange(want) % size, f"{PERMUTE}{node.name}")
            with repair.graph.graph.inserting_before(node):
                other = repair.graph.graph.call_function(torch.index_select, (other, axis, buffer))
    node.args = (node.args[0], other)


@mends("view", "reshape", torch.reshape, "expand", torch.expand_copy, "broadcast_to", torch.broadcast_to)
def shape_literals(repair: Repair) -> None:
    """Sizes that do not hold become those that do; -1 and those read from another tensor stay."""
    node = repair.node
    sizes = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    flat = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    now = [repair.env[size] if isinstance(size, fx.Node) else size for size in flat]
    if len(now) == 1 and isinstance(flat[0], fx.Node) and _sum_literals(repair, flat[0]):
        return
    if len(now) == 1 and isinstance(now[0], tuple):
        now = list(now[0])
        flat = now
    wanted = repair.expected.shape
    mended = [
        old if value in (-1, want) else _in_proportion(repair, old, value, want)
        for old, value, want in zip(flat, now, wanted, strict=True)
    ]
    repair.become(
        node.op,
        node.target,
        (node.args[0], tuple(mended)) if node.op == "call_function" else (node.args[0], *mended),
    )


def _in_proportion(repair: Repair, size: Any, value: int, want: int) -> Any:
    """A size that was computed (batch times heads, say) becomes a share of it, so that it follows the input's."""
    if not isinstance(size, fx.Node) or value <= 0:
        return want
    graph, common = repair.graph.graph, math.gcd(value, want)
    with graph.inserting_before(repair.node):
        for function, number in ((operator.mul, want // common), (operator.floordiv, value // common)):
            if number != 1:
                size = graph.create_node("call_function", function, (size, number), name=f"{SHARE}{repair.node.name}")
    return size


def _sum_literals(repair: Repair, size: fx.Node) -> bool:
    """Mend the literals of a shape that is another tensor's, with some put before or behind; whether that is enough."""
    if size.target is not operator.add or len(size.users) > 1:
        return False
    parts: list[Any] = []
    found: list[int] = []
    for part in cast("tuple[Any, ...]", size.args):
        sizes = repair.env[part] if isinstance(part, fx.Node) else part
        wanted = repair.expected.shape[len(found) : len(found) + len(sizes)]
        literal = tuple(old if old == -1 else want for old, want in zip(sizes, wanted, strict=True))
        parts.append(part if isinstance(part, fx.Node) else literal)
        found += sizes if isinstance(part, fx.Node) else literal
    if any(have not in (-1, want) for have, want in zip(found, repair.expected.shape, strict=True)):
        return False
    size.args = tuple(parts)
    repair.env[size] = torch.Size(found) if min(found) >= 0 else tuple(found)
    return True


@mends("unflatten", torch.unflatten, nn.Unflatten)
def unflatten(repair: Repair) -> None:
    """The sizes that the axis is split into."""
    before, after = repair.old[repair.source.name].shape, repair.expected.shape
    rank = len(after) - len(before) + 1
    if repair.node.op == "call_module":
        dim: Any = repair.graph.get_submodule(str(repair.node.target)).dim
    else:
        dim = repair.node.kwargs.get("dim", repair.node.args[1] if len(repair.node.args) > 1 else 0)
    dim = int(dim) % len(before)
    repair.become("call_method", "unflatten", (repair.source, dim, tuple(after[dim : dim + rank])))


_SPLIT_ALONG = {"vsplit": 0, "hsplit": 1, "dsplit": 2}  # of a tensor with that many axes


@mends("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split, *_SPLIT_ALONG)
@mends(torch.vsplit, torch.hsplit, torch.dsplit)
def split_sizes(repair: Repair) -> None:
    """Whatever way a tensor was split, the pieces get the sizes that they should have."""
    args, kwargs = repair.arguments()
    name = getattr(repair.node.target, "__name__", repair.node.target)
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    if name in _SPLIT_ALONG:
        dim = min(_SPLIT_ALONG[name], repair.env[repair.source].ndim - 1)
    sizes = [piece.shape[dim] for piece in repair.expected]
    repair.become("call_function", torch.split, (repair.source, sizes, dim))


@mends(F.pad, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def pad_amounts(repair: Repair) -> None:
    """Padding channels that went are padded no more."""
    args, kwargs = repair.arguments()
    _, amounts, mode = movement.pad_arguments(repair.graph, repair.node, args, kwargs)
    stays = repair.masks(repair.old[repair.node.name])
    given = repair.node.kwargs.get("pad", repair.node.args[1] if len(repair.node.args) > 1 else None)
    flat = [*given] if isinstance(given, (tuple, list)) else [n for pair in amounts.values() for n in pair]
    for place, (dim, (before, after)) in enumerate(amounts.items()):
        if before and before > 0:
            flat[2 * place] = _kept(repair, flat[2 * place], stays[dim][:before])
        if after and after > 0:
            flat[2 * place + 1] = _kept(repair, flat[2 * place + 1], stays[dim][-after:])
    if repair.node.op == "call_module":
        value = getattr(repair.graph.get_submodule(str(repair.node.target)), "value", 0.0)
    else:
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
    repair.become("call_function", F.pad, (repair.source, flat, mode, value))


def _kept(repair: Repair, amount: Any, stays: Tensor) -> Any:
    """The amount of padding of which only a part stays: as it is written where that is the number."""
    now = repair.env[amount] if isinstance(amount, fx.Node) else amount
    return amount if now == int(stays.sum()) else int(stays.sum())


@mends(torch._assert)
def assertion(repair: Repair) -> None:
    """What the model asserts of the number of channels held for the original."""
    repair.become("call_function", torch._assert, (True, *repair.node.args[1:]))


@mends(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def group_count(repair: Repair) -> None:
    """A functional convolution names its number of groups."""
    node = repair.node
    transposed = "transpose" in str(getattr(node.target, "__name__", ""))
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight = repair.env[given["input"]], repair.env[given["weight"]]
    axis = x.ndim - (weight.ndim - 2) - 1
    channels = repair.expected.shape[axis] if transposed else x.shape[axis]
    repair.become("call_function", node.target, (), given | {"groups": channels // weight.shape[1]})
