"""Choices of the largest channels, such as a router's choice of experts, and lookups by the chosen numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, Plane, vector_plane
from fxprune.rules.table import rule, takes_index
from fxprune.rules.vocabulary import Comparison, Slot

EQUAL = (operator.eq, torch.eq, "eq", "__eq__")


@rule(torch.topk, "topk")
def topk(ctx: Context, x: Labels, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """The values have no channels along the axis; the numbers are places along it."""
    dim = dim % max(x.ndim, 1)
    specs, structure = pytree.tree_flatten(ctx.spec())
    beside, numbers = x.beside(dim), None
    if x.along(dim):
        numbers = ctx.vector(x, dim)
        compare(ctx, x, dim, f"ordered by {ctx.describe()}", least=specs[0].shape[dim])
    shape = (*x.shape[:dim], *specs[0].shape[dim : dim + 1], *x.shape[dim + 1 :])  # the specs' are not narrowed
    found = Labels(shape, beside), Labels(shape, beside, index_of=numbers)
    return pytree.tree_unflatten(found, structure)


def compare(ctx: Context, x: Labels, dim: int, reason: str, *, least: int = 1, statistic: bool = False) -> None:
    """Say that the current node compares the channels along axis `dim` of `x`, see `Comparison`."""
    source = ctx.source(x)
    labels = ctx.vector(x, dim)
    if source is None:
        ctx.freeze(labels, reason)
    else:
        ctx.compare(Comparison(ctx.node, source, dim, labels, reason, least, statistic))


def largest(ctx: Context, x: Labels, dim: int, *, keepdim: bool) -> Any:
    """The largest along an axis of channels, and its number, or the number alone."""
    numbers = ctx.vector(x, dim)
    compare(
        ctx,
        x,
        dim,
        f"{ctx.describe()} takes a statistic over the channels",
        statistic=isinstance(ctx.spec(), TensorSpec),
    )
    specs, structure = pytree.tree_flatten(ctx.spec())
    rest = tuple(plane for plane in x.planes if dim not in plane.axes)
    cut = [plane if keepdim else _without(plane, dim) for plane in rest]
    shape = (*x.shape[:dim], *((1,) if keepdim else ()), *x.shape[dim + 1 :])
    found = [Labels(shape, tuple(cut)) for _ in specs]
    found[-1] = Labels(shape, tuple(cut), index_of=numbers)
    return pytree.tree_unflatten(found, structure)


def _without(plane: Plane, dim: int) -> Plane:
    """The plane of a tensor without axis `dim`, which has size 1 in it."""
    return Plane(plane.core.squeeze(dim), tuple(axis - (axis > dim) for axis in plane.axes))


def told_apart(ctx: Context, args: Any) -> Labels | None:
    """The value of a comparison of experts' numbers with one of them; None where the current node is something else."""
    numbers, other = args if len(args) == 2 else (None, None)
    if ctx.node.target not in EQUAL or not isinstance(numbers, Labels) or numbers.index_of is None:
        return None
    number: Any = other
    if isinstance(other, Labels) and other.value is not None and other.value.numel() == 1:
        number = int(other.value)
    if type(number) is not int or not 0 <= number < len(numbers.index_of):
        return None
    expert = numbers.index_of[number]
    ctx.tell_apart(expert)
    ctx.choose_by_number(numbers.index_of)
    return Labels(numbers.shape, single=(float(expert),))


@rule(F.one_hot)
@takes_index
def one_hot(ctx: Context, numbers: Labels, num_classes: int = -1) -> Any:
    """The new axis has a place for each expert; of other numbers, places are no channels."""
    experts = numbers.index_of
    if experts is None or num_classes != len(experts):
        return ctx.opaque(f"{ctx.describe()} is kept whole", numbers)
    places = ctx.fresh(Slot(ctx.node.name, "experts"), num_classes)
    ctx.tie(places, experts)
    ctx.mark_numbers(places, experts)
    ctx.choose_by_number(experts)
    return Labels((*numbers.shape, num_classes), (vector_plane(places, numbers.ndim, numbers.ndim + 1),))


def apart(ctx: Context, x: Labels, dim: int, index: Labels) -> Labels:
    """`x` without its channels along axis `dim`, from which `index` chooses; they are experts if it numbers these.

    Channels that are chosen by other numbers are left as they are. If the compared channels themselves are looked up,
    such as a weight among the scores, they are no experts: it may be a statistic over channels, such as `max`.
    """
    if index.index_of is None or x.shape[dim] != len(index.index_of):
        ctx.freeze_numbered(index)
        return x
    own = ctx.vector(x, dim)
    ctx.tie(own, index.index_of)
    if not torch.equal(own, index.index_of):
        ctx.choose_by_number(index.index_of)
    return Labels(x.shape, x.beside(dim), x.value)
