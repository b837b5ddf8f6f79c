"""Choices of the largest channels, such as those of experts by a router, and lookups by their numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Comparison


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


def apart(ctx: Context, x: Labels, dim: int, index: Labels) -> Labels:
    """`x` without its channels along axis `dim`, of which `index` chooses: experts, where it numbers these.

    Channels that are chosen by other numbers are left as they are.
    """
    if index.index_of is None or x.shape[dim] != len(index.index_of):
        ctx.freeze_numbered(index)
        return x
    ctx.tie(ctx.vector(x, dim), index.index_of)
    ctx.choose_by_number(index.index_of)
    return Labels(x.shape, x.beside(dim), x.value)
