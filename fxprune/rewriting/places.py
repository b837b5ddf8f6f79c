"""Places: what an operation does with them, found by running it on the places themselves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import RewriteError
from fxprune.rewriting.repair import Repair
from fxprune.rules import movement
from fxprune.rules.context import labels_in
from fxprune.rules.labels import Labels, varying_axes
from fxprune.rules.table import RULES, key_of

Value = Callable[[fx.Node], Any]


def trace(repair: Repair, axis: int, value: Value) -> tuple[int | None, Tensor]:
    """Where along `axis` each index of the result comes from: the node's operation, run on the places themselves.

    Returns the axis of the result that `axis` becomes, or None where one index of it is taken out, and the places.
    """
    result, rank = _moved(repair, axis, value, repair.node.args, repair.node.kwargs), value(repair.source).ndim
    if isinstance(result, Tensor) and 0 in result.shape:
        return result.shape.index(0), torch.empty(0, dtype=torch.int64)
    axes = varying_axes(result)
    if len(axes) > 1 or not isinstance(result, Tensor):
        raise RewriteError("it spreads the channels over several axes")
    out = axes[0] if axes else axis if result.ndim == rank else None
    for dim in reversed(range(result.ndim)):
        if dim != out:
            result = result.select(dim, 0)
    return out, result.long()


def _moved(repair: Repair, axis: int, value: Value, args: Any, kwargs: Any) -> Any:
    """What the node's operation makes of the places along one axis of its first input."""
    args = args[:2] if repair.node.target is operator.setitem else args
    x, (args, kwargs) = value(repair.source), map_arg((args, kwargs), value)
    size = [1] * x.ndim
    size[axis] = x.shape[axis]
    places = torch.arange(x.shape[axis], dtype=torch.float64).reshape(size).expand(x.shape)
    args, kwargs = pytree.tree_map_only(Labels, lambda v: places if v is x else movement.constant(v), (args, kwargs))
    return movement.call(repair.node, repair.graph, args, kwargs)


def check_places(repair: Repair, args: Any, kwargs: Any) -> None:
    """See that a movement by numbers that changed moves what has no channels as it did by the arguments given before.

    Raises RewriteError where it does not: labels do not show it.
    """
    x = repair.old.get(repair.source.name) if repair.node.all_input_nodes else None
    if not isinstance(x, Labels) or not moves(repair) or not any(map(repair.changed, repair.node.all_input_nodes)):
        return
    stays = [repair.masks(part) for part in labels_in(repair.old[repair.node.name])]
    for axis in (axis for axis in range(x.ndim) if x.shape[axis] > 1 and not x.along(axis)):
        before = pytree.tree_leaves(_moved(repair, axis, lambda n: repair.old[n.name], args, kwargs))
        now = _moved(repair, axis, repair.env.__getitem__, repair.node.args, repair.node.kwargs)
        for masks, then, part in zip(stays, before, pytree.tree_leaves(now), strict=True):
            if not torch.equal(_picked(then, masks), part):
                raise RewriteError(f"{repair.node.name} moves other places than in the original")


def _picked(tensor: Tensor, masks: list[Tensor]) -> Tensor:
    """What stays of a tensor, by masks of all its axes."""
    for dim, mask in enumerate(masks):
        tensor = tensor if bool(mask.all()) else tensor.index_select(dim, mask.nonzero().flatten())
    return tensor


def moves(repair: Repair) -> bool:
    """Whether the node is a data movement."""
    rule = RULES.get(key_of(repair.node, repair.graph)) if repair.node.op.startswith("call") else None
    return rule is not None and rule.__module__ == movement.__name__
