"""Mending of sizes: new literals in the calls that name the sizes of channels, or numbers that follow from them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.rewriting.mending import follows, gather, mends, preserves, restore
from fxprune.rewriting.node_mending import Mending
from fxprune.rewriting.original_sizes import original, share, sized, sizes
from fxprune.rules import fills, movement
from fxprune.rules.vocabulary import FILLS, LIKES


@preserves(F.scaled_dot_product_attention)
def scale(mending: Mending) -> None:
    """The scale is that of the original's head size."""
    before = mending.before.shape[-1]
    if mending.node.kwargs.get("scale") is None and mending.now.shape[-1] != before:
        mending.node.kwargs = dict(mending.node.kwargs) | {"scale": before**-0.5}


@preserves(torch.tensor, torch.as_tensor, torch.scalar_tensor)
def number_as_tensor(mending: Mending) -> None:
    """A number that was read from a size and becomes a tensor is the original's."""
    restore(mending)


@follows(*FILLS)
def fill_value(mending: Mending) -> None:
    """A number that a new tensor is filled with is the original's."""
    given = fills.filled_with(mending.node)
    if isinstance(given, fx.Node):
        value = original(mending, given, (int, float))
        _set_argument(mending, 1 if mending.node.op == "call_function" else 2, "fill_value", value)


@mends(*FILLS)
def fill_sizes(mending: Mending) -> None:
    """The kept sizes."""
    node, given = mending.node, fills.sizes_of(mending.node, mending.env)
    wanted, first = _all_matched(mending, given, mending.expected.shape), int(node.op == "call_method")
    kept = (filled,) if (filled := fills.filled_with(node)) is not None and "fill_value" not in node.kwargs else ()
    kwargs = {name: value for name, value in node.kwargs.items() if name != "size"}
    mending.become(node.op, node.target, (*node.args[:first], wanted, *kept), kwargs)


@mends(*LIKES)
def fill_of_kept_sizes(mending: Mending) -> None:
    """The sizes are no longer those of the other tensor, but of its axes without channels."""
    node, shape = mending.node, mending.insert(getattr, mending.source, "shape")
    mending.env[shape] = torch.Size(mending.now.shape)
    kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}
    name = str(node.target.__name__).removesuffix("_like")
    mending.become(
        "call_method",
        f"new_{name}",
        (node.args[0], sizes(mending, shape, mending.expected.shape), *node.args[1:]),
        kwargs,
    )


@follows(F.group_norm, torch.group_norm)
def groups_of_norm(mending: Mending) -> None:
    """Groups keep their size, unless there is only one."""
    now, before = mending.now.shape[1], mending.before.shape[1]
    given = mending.argument(1, "num_groups", 1)
    count = mending.old[given.name] if isinstance(given, fx.Node) else given
    if now != before and count != 1:
        _set_argument(mending, 1, "num_groups", _matched(mending, given, now // (before // count)))


@follows(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def normalized_shape(mending: Mending) -> None:
    """The last axes of the input."""
    if mending.now.shape != mending.before.shape:
        given = mending.argument(1, "normalized_shape", ())
        _set_argument(mending, 1, "normalized_shape", _all_matched(mending, given, mending.now.shape))


def _set_argument(mending: Mending, place: int, name: str, value: Any) -> None:
    """Give the node another argument, by place or name as it was, unless its node gives the same value already."""
    node = mending.node
    if map_arg(mending.argument(place, name), mending.env.get) == value:
        return
    if name in node.kwargs:
        node.kwargs = dict(node.kwargs) | {name: value}
    else:
        node.update_arg(place, value)


def _matched(mending: Mending, size: Any, wanted: int) -> Any:
    """A size as it was given, where it is -1 or the wanted one; otherwise a number or a node that gives that."""
    value = mending.env[size] if isinstance(size, fx.Node) else size
    return size if value in (-1, wanted) else sized(mending, size, wanted)


def _all_matched(mending: Mending, given: Any, wanted: Sequence[int]) -> Any:
    """A shape as it was given, or one with other entries, so that it is the last of the wanted sizes."""
    count = len(mending.env[given] if isinstance(given, fx.Node) else given)
    last = tuple(wanted[len(wanted) - count :])
    if isinstance(given, fx.Node):
        return given if tuple(mending.env[given]) == last else sizes(mending, given, last)
    return tuple(_matched(mending, *pair) for pair in zip(given, last, strict=True))


@mends("view_as", "reshape_as", "expand_as")
def shape_of_another(mending: Mending) -> None:
    """The sizes are those of the other tensor, or scaled from them."""
    node, other = mending.node, mending.node.args[1]
    shape = mending.insert(getattr, other, "shape")
    mending.env[shape] = mending.env[other].shape
    name = "expand" if node.target == "expand_as" else "reshape"
    mending.become("call_method", name, (node.args[0], *sizes(mending, shape, mending.expected.shape)))


@mends("view", "reshape", torch.reshape, "expand", torch.expand_copy, "broadcast_to", torch.broadcast_to)
def shape_literals(mending: Mending) -> None:
    """Sizes that do not fit are replaced by those that do."""
    node = mending.node
    given = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    if isinstance(given, (tuple, list)) and len(given) == 1:
        only = mending.env[given[0]] if isinstance(given[0], fx.Node) else given[0]
        given = given[0] if isinstance(only, (tuple, list)) else given
    if isinstance(given, fx.Node) and _mend_sum(mending, given):
        return
    x, shape = mending.argument(0, "input"), _all_matched(mending, given, mending.expected.shape)
    mending.become(node.op, node.target, (x, shape) if node.op == "call_function" else (x, *shape))


@mends("repeat_interleave", torch.repeat_interleave)
def repeats_of_one(mending: Mending) -> None:
    """As `repeats`, along one axis."""
    args, kwargs = mending.arguments()
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    if mending.now.shape[dim] != 1:
        gather(mending)
        return
    count = _matched(mending, mending.argument(1, "repeats"), mending.expected.shape[dim])
    mending.become("call_method", "repeat_interleave", (mending.source, count, dim))


@mends("repeat")
def repeats(mending: Mending) -> None:
    """An axis of one entry is repeated for the kept channels only."""
    args, now = mending.node.args[1:], mending.now
    counts = args[0] if isinstance(args[0], (tuple, list)) else args
    sizes = (1,) * (len(counts) - now.ndim) + now.shape
    if any(size != 1 and count != 1 for size, count in zip(sizes, counts, strict=True)):
        gather(mending)
        return
    trios = zip(counts, sizes, mending.expected.shape, strict=True)
    kept = [_matched(mending, count, want) if size == 1 else count for count, size, want in trios]
    mending.become("call_method", "repeat", (mending.source, *kept))


def _mend_sum(mending: Mending, size: fx.Node) -> bool:
    """Mend the literals before or behind another tensor's shape, to which they are added; whether that is enough."""
    if size.target is not operator.add or len(size.users) > 1:
        return False
    parts: list[Any] = []
    found: list[int] = []
    for part in cast("tuple[Any, ...]", size.args):
        if not isinstance(part, fx.Node):
            pairs = zip(part, mending.expected.shape[len(found) :], strict=False)
            part = tuple(old if isinstance(old, fx.Node) or old == -1 else want for old, want in pairs)  # noqa: PLW2901
        parts.append(part)
        found += cast("tuple[int, ...]", map_arg(part, lambda n: mending.env[n]))
    if any(have not in (-1, want) for have, want in zip(found, mending.expected.shape, strict=True)):
        return False
    size.args = tuple(parts)
    mending.env[size] = torch.Size(found) if min(found) >= 0 else tuple(found)
    return True


@mends("unflatten", torch.unflatten, nn.Unflatten)
def unflatten(mending: Mending) -> None:
    """The sizes that the axis is split into."""
    rank = mending.before.ndim
    if mending.node.op == "call_module":
        module: Any = mending.graph.get_submodule(str(mending.node.target))
        dim, given = module.dim, module.unflattened_size
    else:
        dim, given = mending.argument(1, "dim"), mending.argument(2, "sizes")
    dim = int(dim) % rank
    wanted = mending.expected.shape[dim : dim + mending.expected.ndim - rank + 1]
    mending.become("call_method", "unflatten", (mending.source, dim, _all_matched(mending, given, wanted)))


_SPLIT_ALONG = {"vsplit": 0, "hsplit": 1, "dsplit": 2}  # of a tensor with that many axes


@mends("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split, *_SPLIT_ALONG)
@mends(torch.vsplit, torch.hsplit, torch.dsplit, torch.split_with_sizes, "split_with_sizes")
def split_sizes(mending: Mending) -> None:
    """However a tensor was split, the pieces get the expected sizes."""
    args, kwargs = mending.arguments()
    name = getattr(mending.node.target, "__name__", mending.node.target)
    x = mending.now
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    if name in _SPLIT_ALONG:
        dim = min(_SPLIT_ALONG[name], x.ndim - 1)
    pieces: list[Any] = [piece.shape[dim] for piece in mending.expected]
    if not x.is_of_channels(dim) or mending.grows(mending.source.name, dim):
        size = mending.insert("size", mending.source, dim, op="call_method")
        pieces = [share(mending, size, x.shape[dim], piece) for piece in pieces]
    mending.become("call_function", torch.split, (mending.source, pieces, dim))


@mends(F.pad, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def pad_amounts(mending: Mending) -> None:
    """Removed channels of the padding are padded no more."""
    args, kwargs = mending.arguments()
    _, amounts, mode = movement.pad_arguments(mending.graph, mending.node, args, kwargs)
    given = mending.argument(1, "pad", ())
    kept = mending.masks(mending.old[mending.node.name])
    wanted: list[Any] = []
    for dim, (before, after) in amounts.items():
        kept_after = int(kept[dim][len(kept[dim]) - after :].sum()) if after and after > 0 else after
        wanted += [int(kept[dim][:before].sum()) if before and before > 0 else before, kept_after]
    flat: list[Any] = wanted
    if isinstance(given, (tuple, list)):
        pairs = zip(given, wanted, strict=bool(given))
        flat = [own if want is None else _matched(mending, own, want) for own, want in pairs]
    if mending.node.op == "call_module":
        value = getattr(mending.graph.get_submodule(str(mending.node.target)), "value", 0.0)
    else:
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
    mending.become("call_function", F.pad, (mending.source, flat, mode, value))


@mends(torch._assert)
def assertion(mending: Mending) -> None:
    """An assertion about the number of channels is dropped: it held for the original."""
    mending.become("call_function", torch._assert, (True, *mending.node.args[1:]))


@follows(F.conv1d, F.conv2d, F.conv3d)
@follows(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def group_count(mending: Mending) -> None:
    """The number of groups of a functional convolution."""
    node = mending.node
    transposed = "transpose" in str(getattr(node.target, "__name__", ""))
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight = mending.env[given["input"]], mending.env[given["weight"]]
    axis = x.ndim - (weight.ndim - 2) - 1
    channels = mending.expected.shape[axis] if transposed else x.shape[axis]
    groups = _matched(mending, given.get("groups", 1), channels // weight.shape[1])
    if groups is not given.get("groups", 1):
        mending.become("call_function", node.target, (), given | {"groups": groups})
