"""Choices of the largest channels, such as those of experts by a router, and what is looked up by their numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Comparison

_WHOLE = (torch.int16, torch.int32, torch.int64)


@rule(torch.topk, "topk")
def topk(ctx: Context, x: Labels, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """The values have no channels along the axis; the numbers are places along it."""
    dim = dim % max(x.ndim, 1)
    specs, structure = pytree.tree_flatten(ctx.spec())
    beside, numbers = x.beside(dim), None
    if x.along(dim):
        numbers = ctx.vector(x, dim)
        compare(ctx, x, dim, f"ordered by {ctx.describe()}", least=specs[0].shape[dim])
    found = Labels(specs[0].shape, beside), Labels(specs[1].shape, beside, index_of=numbers)
    return pytree.tree_unflatten(found, structure)


def compare(ctx: Context, x: Labels, dim: int, reason: str, *, least: int = 1, statistic: bool = False) -> None:
    """Say that the current node compares the channels along axis `dim` of `x`, see `Comparison`."""
    source = ctx.source(x)
    labels = ctx.vector(x, dim)
    if source is None:
        ctx.freeze(labels, reason)
    else:
        ctx.compare(Comparison(ctx.node, source, dim, labels, reason, least, statistic))


def looked_up(ctx: Context, x: Labels, args: Any) -> Labels | None:
    """The value of `x` at computed places along one axis; None where the current node does something else.

    The channels along that axis are experts, where the places are chosen among them, and are kept otherwise.
    """
    name = getattr(ctx.node.target, "__name__", ctx.node.target)
    index = args[-1] if len(args) > 1 and isinstance(args[-1], Labels) else None
    if index is None or index.value is not None or _dtype(ctx, index) not in _WHOLE:
        return None
    dim = args[1] % x.ndim if isinstance(args[1], int) and x.ndim else 0
    if ctx.node.target in (operator.getitem, "__getitem__") and index is args[1]:
        by = index.ndim - 1
    elif (name == "index_select" and index.ndim == 1) or (name == "gather" and not x.beside(dim)):
        by = 0
    else:
        return None
    if any(len(plane.axes) > 1 for plane in x.along(dim)):
        return None
    choose(ctx, x, dim, index)
    planes = (Plane(_stretched(p, dim, by), tuple(a + by * (a > dim) for a in p.axes)) for p in x.beside(dim))
    sizes = index.shape if name == "gather" else (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    return Labels(tuple(sizes), tuple(planes))


def choose(ctx: Context, x: Labels, dim: int, index: Labels) -> None:
    """Tie the channels along axis `dim` of `x` to the experts that `index` numbers; those of other numbers are kept."""
    channels = ctx.vector(x, dim)
    if index.index_of is not None and len(index.index_of) == len(channels):
        ctx.tie(channels, index.index_of)
        ctx.choose_by_number(index.index_of)
    else:
        for labels in (channels, *(() if index.index_of is None else (index.index_of,))):
            ctx.freeze(labels, f"picked by a computed index in {ctx.describe()}")


def _stretched(plane: Plane, dim: int, by: int) -> torch.Tensor:
    """The labels of a plane with `by` more axes of size 1 in the place of axis `dim`."""
    shape = plane.core.shape
    return plane.core.reshape(*shape[:dim], *[1] * (by + 1), *shape[dim + 1 :])


def _dtype(ctx: Context, x: Labels) -> Any:
    source = ctx.source(x)
    return None if source is None else getattr(ctx.spec(source), "dtype", None)
