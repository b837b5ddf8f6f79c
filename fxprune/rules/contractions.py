"""Products of two tensors that sum over an axis: the axis is read, the others go through."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.rules.context import Context, clusters, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Meeting

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule(operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.mv, "matmul", "bmm", "mm", "mv", "__matmul__")
def matmul(ctx: Context, a: Labels, b: Labels) -> Labels:
    """Rows of a by columns of b; batch axes meet as in an element-wise op."""
    return product(ctx, a, b)


def product(ctx: Context, a: Labels, b: Labels, *, tag: str = "", constant: Sequence[bool] | None = None) -> Labels:
    """The matrix product of two tensors of any rank; see `contract`."""
    batch = _LETTERS[: max(a.ndim, b.ndim, 2) - 2]
    rows, columns = "Y" * (a.ndim > 1), "Z" * (b.ndim > 1)
    left = batch[len(batch) - max(a.ndim - 2, 0) :] + rows + "X"
    right = batch[len(batch) - max(b.ndim - 2, 0) :] + "X" + columns
    return contract(ctx, (left, right), (a, b), batch + rows + columns, tag=tag, constant=constant)


@rule(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def addmm(ctx: Context, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> Labels:
    """Bias + a b."""
    result = product(ctx, a, b)
    return ctx.meet((bias, result), result.shape)


@rule(torch.addbmm, "addbmm")
def addbmm(ctx: Context, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> Labels:
    """Bias + the sum over the batch of a b."""
    result = contract(ctx, ("NYX", "NXZ"), (a, b), "YZ")
    return ctx.meet((bias, result), result.shape)


@rule(torch.einsum)
def einsum(ctx: Context, equation: str, *operands: Any) -> Labels:
    """Axes of one letter are tied; a letter that the output lacks is read, the others go through."""
    inputs = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    terms, output = terms_of(equation, inputs)
    return contract(ctx, terms, inputs, output)


def contract(
    ctx: Context,
    terms: Sequence[str],
    inputs: Sequence[Labels],
    output: str,
    *,
    tag: str = "",
    constant: Sequence[bool] | None = None,
) -> Labels:
    """The sum over every letter that `output` lacks of the product of the inputs; `terms` name the axes of each.

    What is summed is read. Where heads and places in them form a grid, either whole heads go, from all inputs, or the
    same places of every head: what is left of a head after the sum has a label of its own. `constant` says which inputs
    depend on no input of the model, where they are not the node's own.
    """
    constant = constant or [ctx.is_constant(x) for x in inputs]
    letters = output + "".join(sorted(set("".join(terms)) - set(output)))
    if any(len(set(term)) < len(term) for term in terms):
        kept: Labels = ctx.opaque(f"a diagonal is taken by {ctx.describe()}", list(inputs))
        return kept
    aligned = [_aligned(x, term, letters) for term, x in zip(terms, inputs, strict=True)]
    sizes = [
        [x.shape[term.index(c)] if c in term else 1 for c in letters] for term, x in zip(terms, inputs, strict=True)
    ]
    summed = frozenset(range(len(output), len(letters)))
    planes = []
    for axes in clusters(aligned):
        meeting = Meeting(axes, aligned, sizes, summed, f"{tag}left", ctx.by_heads)
        planes.append(ctx.merge(meeting))
        for axis in summed & set(axes):
            _read(
                ctx,
                meeting,
                axis,
                [(x, term.find(letters[axis])) for x, term in zip(inputs, terms, strict=True)],
                constant,
            )
    for x, own, fixed in zip(inputs, aligned, constant, strict=True):
        if fixed and x.planes:  # a weight: what it brings along the axes that stay is computed here
            ctx.produce(_labels([plane for plane in own if not summed & set(plane.axes)]), ctx.site(x))
    shape = tuple(
        max(size[axis] for size in sizes) if all(size[axis] for size in sizes) else 0 for axis in range(len(output))
    )
    return Labels(shape, tuple(_cut(plane, len(output)) for plane in planes if plane is not None))


def _aligned(x: Labels, term: str, letters: str) -> list[Plane]:
    """The planes of one input over the axes of all letters."""
    order = [term.index(c) for c in letters if c in term]
    found = []
    for plane in x.planes:
        core = plane.core.permute(order)
        sizes = iter(core.shape)
        shape = [next(sizes) if c in term else 1 for c in letters]
        found.append(Plane(core.reshape(shape), tuple(sorted(letters.index(term[axis]) for axis in plane.axes))))
    return found


def _cut(plane: Plane, rank: int) -> Plane:
    """The plane without the axes that were summed, which have size 1 in it."""
    return Plane(plane.core.reshape(plane.core.shape[:rank]), plane.axes)


def _read(
    ctx: Context, meeting: Meeting, axis: int, places: Sequence[tuple[Labels, int]], constant: Sequence[bool]
) -> None:
    """The edge on which a summed axis is read: on the first input that depends on the model's inputs."""
    holders = [
        (fixed, plane, place)
        for planes, place, fixed in zip(meeting.inputs, places, constant, strict=True)
        for plane in planes
        if axis in plane.axes
    ]
    _, plane, (x, dim) = min(holders, key=lambda holder: holder[0])
    slices = plane.core.movedim(axis, 0).reshape(plane.core.shape[axis], -1)
    ctx.read(x, dim, slices[:, 0], across=slices if slices.shape[1] > 1 else None)


def terms_of(equation: str, inputs: list[Labels]) -> tuple[list[str], str]:
    """The letters of every input's axes and of the output's, with an ellipsis or an implicit output spelled out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if letter not in equation]
    widths = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, inputs, strict=True)]
    widest = max(width if "..." in term else 0 for term, width in zip(terms, widths, strict=True))
    spelled = [t.replace("...", "".join(spare[widest - w : widest])) for t, w in zip(terms, widths, strict=True)]
    if not arrow:
        letters = "".join(spelled)
        output = "..." * bool(widest) + "".join(sorted(c for c in set(left) - set(",.") if letters.count(c) == 1))
    return spelled, output.replace("...", "".join(spare[:widest]))


@rule(nn.Bilinear, torch.bilinear, torch.outer, torch.kron, torch.tensordot, torch.cdist)
def outer(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Products of every channel with every other: nothing can leave by itself."""
    return ctx.opaque(f"every channel meets every other in {ctx.describe()}", labels_in((args, kwargs)))


def _labels(planes: Sequence[Plane]) -> Tensor:
    """All labels of some planes, in one vector."""
    return torch.cat([torch.empty(0, dtype=torch.float64), *(plane.core.reshape(-1) for plane in planes)])
