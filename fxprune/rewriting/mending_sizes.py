"""Mending by numbers: new literals in the calls that name the sizes of channels, or numbers that follow from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.rewriting.mending import mends, preserves, restore
from fxprune.rewriting.original_sizes import inserted, share, sized, sizes
from fxprune.rewriting.repair import Repair
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


@preserves(F.group_norm, torch.group_norm, follows=True)
def groups_of_norm(repair: Repair) -> None:
    """Groups keep their size, where there are several."""
    now, before = repair.env[repair.source].shape[1], repair.old[repair.source.name].shape[1]
    given = repair.node.kwargs.get("num_groups", repair.node.args[1] if len(repair.node.args) > 1 else 1)
    count = repair.old[given.name] if isinstance(given, fx.Node) else given
    if now != before and count != 1:
        _set_argument(repair, 1, "num_groups", _held(repair, given, now // (before // count)))


@preserves(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, follows=True)
def normalized_shape(repair: Repair) -> None:
    """The last axes of the input."""
    node, now = repair.node, repair.env[repair.source].shape
    named = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ())
    if now != repair.old[repair.source.name].shape:
        _set_argument(repair, 1, "normalized_shape", _all_held(repair, named, now))


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


def _held(repair: Repair, size: Any, want: int) -> Any:
    """A size as it was given, where it holds or is -1; or what gives the one that does."""
    value = repair.env[size] if isinstance(size, fx.Node) else size
    return size if value in (-1, want) else sized(repair, size, want)


def _all_held(repair: Repair, given: Any, wanted: Sequence[int]) -> Any:
    """A shape as it was given, where it holds as the last of these sizes, or one with what gives those that do."""
    count = len(repair.env[given] if isinstance(given, fx.Node) else given)
    last = tuple(wanted[len(wanted) - count :])
    if isinstance(given, fx.Node):
        return given if tuple(repair.env[given]) == last else sizes(repair, given, last)
    return tuple(_held(repair, *pair) for pair in zip(given, last, strict=True))


@mends("view_as", "reshape_as", "expand_as")
def shape_of_another(repair: Repair) -> None:
    """The sizes are those of the other tensor, where they hold, or shares of them."""
    node, other = repair.node, repair.node.args[1]
    shape = inserted(repair, getattr, other, "shape")
    repair.env[shape] = repair.env[other].shape
    name = "expand" if node.target == "expand_as" else "reshape"
    repair.become("call_method", name, (node.args[0], *sizes(repair, shape, repair.expected.shape)))


@mends("view", "reshape", torch.reshape, "expand", torch.expand_copy, "broadcast_to", torch.broadcast_to)
def shape_literals(repair: Repair) -> None:
    """Sizes that do not hold become those that do."""
    node = repair.node
    x = node.args[0] if node.args else node.kwargs["input"]
    given = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    if isinstance(given, (tuple, list)) and len(given) == 1 and _is_shape(repair, given[0]):
        given = given[0]
    if isinstance(given, fx.Node) and _sum_literals(repair, given):
        return
    mended = _all_held(repair, given, repair.expected.shape)
    repair.become(node.op, node.target, (x, mended) if node.op == "call_function" else (x, *mended))


def _is_shape(repair: Repair, size: Any) -> bool:
    return isinstance(repair.env[size] if isinstance(size, fx.Node) else size, (tuple, list))


def _sum_literals(repair: Repair, size: fx.Node) -> bool:
    """Mend the literals of a shape that is another tensor's, with some put before or behind; whether that is enough."""
    if size.target is not operator.add or len(size.users) > 1:
        return False
    parts: list[Any] = []
    found: list[int] = []
    for part in cast("tuple[Any, ...]", size.args):
        held = part if isinstance(part, fx.Node) else _literals(part, repair.expected.shape[len(found) :])
        parts.append(held)
        found += cast("tuple[int, ...]", map_arg(held, lambda n: repair.env[n]))
    if any(have not in (-1, want) for have, want in zip(found, repair.expected.shape, strict=True)):
        return False
    size.args = tuple(parts)
    repair.env[size] = torch.Size(found) if min(found) >= 0 else tuple(found)
    return True


def _literals(part: Sequence[Any], wanted: Sequence[int]) -> tuple[Any, ...]:
    """A part of a shape with the numbers that are wanted; -1 and those that nodes give stay."""
    return tuple(
        old if isinstance(old, fx.Node) or old == -1 else want for old, want in zip(part, wanted, strict=False)
    )


@mends("unflatten", torch.unflatten, nn.Unflatten)
def unflatten(repair: Repair) -> None:
    """The sizes that the axis is split into."""
    node, rank = repair.node, repair.old[repair.source.name].ndim
    if node.op == "call_module":
        module: Any = repair.graph.get_submodule(str(node.target))
        dim, given = module.dim, module.unflattened_size
    else:
        named = dict(zip(("input", "dim", "sizes"), node.args, strict=False)) | node.kwargs
        dim, given = named["dim"], named["sizes"]
    dim = int(dim) % rank
    wanted = repair.expected.shape[dim : dim + repair.expected.ndim - rank + 1]
    repair.become("call_method", "unflatten", (repair.source, dim, _all_held(repair, given, wanted)))


_SPLIT_ALONG = {"vsplit": 0, "hsplit": 1, "dsplit": 2}  # of a tensor with that many axes


@mends("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split, *_SPLIT_ALONG)
@mends(torch.vsplit, torch.hsplit, torch.dsplit)
def split_sizes(repair: Repair) -> None:
    """Whatever way a tensor was split, the pieces get the sizes that they should have."""
    args, kwargs = repair.arguments()
    name = getattr(repair.node.target, "__name__", repair.node.target)
    x = repair.env[repair.source]
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    if name in _SPLIT_ALONG:
        dim = min(_SPLIT_ALONG[name], x.ndim - 1)
    pieces: list[Any] = [piece.shape[dim] for piece in repair.expected]
    if not x.is_of_channels(dim) or repair.grows(repair.source.name, dim):
        size = inserted(repair, "size", repair.source, dim, op="call_method")
        pieces = [share(repair, size, x.shape[dim], piece) for piece in pieces]
    repair.become("call_function", torch.split, (repair.source, pieces, dim))


@mends(F.pad, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def pad_amounts(repair: Repair) -> None:
    """Padding channels that went are padded no more."""
    args, kwargs = repair.arguments()
    _, amounts, mode = movement.pad_arguments(repair.graph, repair.node, args, kwargs)
    given = repair.node.kwargs.get("pad", repair.node.args[1] if len(repair.node.args) > 1 else ())
    stays = repair.masks(repair.old[repair.node.name])
    wanted: list[Any] = []
    for dim, (before, after) in amounts.items():
        kept_after = int(stays[dim][len(stays[dim]) - after :].sum()) if after and after > 0 else after
        wanted += [int(stays[dim][:before].sum()) if before and before > 0 else before, kept_after]
    flat: list[Any] = wanted
    if isinstance(given, (tuple, list)):
        pairs = zip(given, wanted, strict=bool(given))
        flat = [own if want is None else _held(repair, own, want) for own, want in pairs]
    if repair.node.op == "call_module":
        value = getattr(repair.graph.get_submodule(str(repair.node.target)), "value", 0.0)
    else:
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
    repair.become("call_function", F.pad, (repair.source, flat, mode, value))


@mends(torch._assert)
def assertion(repair: Repair) -> None:
    """What the model asserts of the number of channels held for the original."""
    repair.become("call_function", torch._assert, (True, *repair.node.args[1:]))


@preserves(F.conv1d, F.conv2d, F.conv3d, follows=True)
@preserves(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, follows=True)
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
    groups = _held(repair, given.get("groups", 1), channels // weight.shape[1])
    if groups is not given.get("groups", 1):
        repair.become("call_function", node.target, (), given | {"groups": groups})
