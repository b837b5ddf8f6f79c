"""Places along an axis: where an operation moves them, found by running it on their numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import RewriteError
from fxprune.rewriting.node_mending import Mending
from fxprune.rewriting.remaining import selected
from fxprune.rules import movement, picking
from fxprune.rules.context import labels_in
from fxprune.rules.labels import Labels, varying_axes
from fxprune.rules.table import RULES

Value = Callable[[fx.Node], Any]


def trace(mending: Mending, axis: int, value: Value) -> tuple[int | None, Tensor]:
    """Find which place along `axis` each index of the result comes from, by the node's operation on the places.

    Returns the axis of the result that `axis` becomes, or None where one index of it is selected, and the places.
    """
    result, rank = _moved(mending, axis, value, mending.node.args, mending.node.kwargs), value(mending.source).ndim
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


def _moved(mending: Mending, axis: int, value: Value, args: Any, kwargs: Any) -> Any:
    """The result of the node's operation on the places along one axis of its first input."""
    args = args[:2] if mending.node.target is operator.setitem else args
    x, (args, kwargs) = value(mending.source), map_arg((args, kwargs), value)
    size = [1] * x.ndim
    size[axis] = x.shape[axis]
    places = torch.arange(x.shape[axis], dtype=torch.float64).reshape(size).expand(x.shape)
    args, kwargs = pytree.tree_map_only(Labels, lambda v: places if v is x else picking.constant(v), (args, kwargs))
    return movement.call(mending.node, mending.graph, args, kwargs)


def check_places(mending: Mending, args: Any, kwargs: Any) -> None:
    """Raise RewriteError where a movement by changed numbers moves axes without channels elsewhere than `args` did.

    Labels do not show this.
    """
    x = mending.old.get(mending.source.name) if mending.node.all_input_nodes else None
    if not isinstance(x, Labels) or not moves(mending) or not any(map(mending.changed, mending.node.all_input_nodes)):
        return
    kept = [mending.masks(part) for part in labels_in(mending.old[mending.node.name])]
    for axis in (axis for axis in range(x.ndim) if x.shape[axis] > 1 and not x.along(axis)):
        before = pytree.tree_leaves(_moved(mending, axis, lambda n: mending.old[n.name], args, kwargs))
        now = _moved(mending, axis, mending.env.__getitem__, mending.node.args, mending.node.kwargs)
        for masks, then, part in zip(kept, before, pytree.tree_leaves(now), strict=True):
            if not torch.equal(selected(then, masks), part):
                raise RewriteError(f"{mending.node.name} moves other places than in the original")


def moves(mending: Mending) -> bool:
    """Whether the node is a data movement."""
    rule = RULES.get(mending.key)
    return rule is not None and rule.__module__ == movement.__name__
