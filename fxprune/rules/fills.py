"""New tensors of one number: alike on all channels, they take the labels of whatever they meet, and are resized."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, Plane, vector_plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import FILLS, LIKES, Slot

_SIZE = ("size", torch.Tensor.size)
_NUMBERS: dict[Any, int] = {torch.zeros: 0, torch.ones: 1, "new_zeros": 0, "new_ones": 1}


@rule(*FILLS)  # type: ignore[arg-type]
def fill(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """Fresh labels along every axis that may hold channels; numbers of places and truths have none."""
    given = sizes_of(ctx.node, ctx.env)
    shape, spec = tuple(map_arg(given, ctx.env.__getitem__)), ctx.spec()
    planes = _fresh(ctx, shape, lambda axis: _is_free(ctx, given, axis))
    number = _NUMBERS.get(ctx.node.target, filled_with(ctx.node))
    if type(number) not in (bool, int, float, complex):
        return Labels(shape, planes)
    one = torch.full((), number, dtype=spec.dtype).expand(shape)
    return Labels(shape, planes, one if planes else one.clone())


@rule(*LIKES)  # type: ignore[arg-type]
def fill_like(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """The labels of the other tensor; where it has none, such as the model's input, fresh ones behind the samples."""
    if x.planes:
        return ctx.meet([x], x.shape)
    return Labels(x.shape, _fresh(ctx, x.shape, lambda axis: axis > 0 and not _is_scattered(ctx, axis, x.ndim)))


def _fresh(ctx: Context, shape: Sequence[int], is_free: Callable[[int], bool]) -> tuple[Plane, ...]:
    """Labels along the axes that may hold channels in the original; places and truths have none."""
    kind, name = ctx.spec().dtype, ctx.node.name
    axes = ctx.slot_axes(name, shape) if kind.is_floating_point or kind.is_complex else ()
    free = [axis for axis in axes if ctx.remember(f"free{axis}", int(is_free(axis)))]
    return tuple(vector_plane(ctx.fresh(Slot(name, axis), shape[axis]), axis, len(shape)) for axis in free)


def sizes_of(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """The sizes of a new tensor as its call gives them: a tuple of numbers and nodes, or one node of them all."""
    given: Any = node.kwargs.get("size", node.args[int(node.op == "call_method") :])
    first = given[0] if isinstance(given, (tuple, list)) and given else None
    return first if isinstance(map_arg(first, env.get), (tuple, list)) else given


def filled_with(node: fx.Node) -> Any:
    """The number, or the node, with which a call of `full` or `new_full` fills its tensor; None for other calls."""
    place = {torch.full: 1, "new_full": 2}.get(node.target)
    return None if place is None else node.kwargs.get("fill_value", dict(enumerate(node.args)).get(place))


def _is_scattered(ctx: Context, axis: int, rank: int) -> bool:
    """Whether numbers are written along an axis at computed places, which are no experts': it has no channels."""
    for user in ctx.node.users:
        if str(user.target).startswith("scatter") and len(user.args) > 2 and user.args[0] is ctx.node:
            index: Any = ctx.env.get(user.args[2])  # type: ignore[arg-type]
            if user.args[1] % rank == axis and isinstance(index, Labels) and index.index_of is None:  # type: ignore[operator]
                return True
    return False


def _is_free(ctx: Context, given: Any, axis: int) -> bool:
    """Whether an axis may hold channels: its size is not that of an axis of samples or positions."""
    if isinstance(given, (tuple, list)) and _is_scattered(ctx, axis, len(given)):
        return False
    size, entry = (given, axis) if isinstance(given, fx.Node) else (given[axis], None)
    if not isinstance(size, fx.Node):
        return True
    of_channels = reads_channels(ctx, size, entry)
    return axis > 0 if of_channels is None else of_channels


def reads_channels(ctx: Context, size: Any, entry: int | None = None) -> bool | None:
    """Whether a node reads a size, or this entry of a shape, from an axis with channels; None for a computed one."""
    if size.target is operator.getitem and isinstance(size.args[1], int):
        size, entry = size.all_input_nodes[0], size.args[1]
    elif size.target in _SIZE and len(size.args) == 2:
        entry = size.args[1]
    tensor = ctx.env.get(size.all_input_nodes[0]) if size.target in (*_SIZE, getattr) else None
    if entry is None or not isinstance(tensor, Labels):
        return None
    return bool(tensor.along(entry % tensor.ndim))
