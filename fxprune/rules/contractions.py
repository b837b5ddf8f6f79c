"""Products of tensors that sum over an axis: the node reads its channels, and the other axes keep theirs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxprune.rules.context import Context, clusters, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Meeting

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule(operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.mv, "matmul", "bmm", "mm", "mv", "__matmul__")
def matmul(ctx: Context, a: Labels, b: Labels) -> Labels:
    """Rows of a times columns of b; batch axes meet as in an element-wise op."""
    return product(ctx, a, b)


def product(ctx: Context, a: Labels, b: Labels, *, tag: str = "", constant: Sequence[bool] | None = None) -> Labels:
    """The matrix product of two tensors of any rank; see `contract`."""
    batch = _LETTERS[: max(a.ndim, b.ndim, 2) - 2]
    rows, columns = "Y" * (a.ndim > 1), "Z" * (b.ndim > 1)
    left = batch[len(batch) - max(a.ndim - 2, 0) :] + rows + "X"
    right = batch[len(batch) - max(b.ndim - 2, 0) :] + "X" + columns
    return contract(ctx, (left, right), (a, b), batch + rows + columns, tag=tag, constant=constant)


@rule(torch.inner, torch.dot, "inner", "dot")
def inner(ctx: Context, a: Labels, b: Labels) -> Labels:
    """The last axes are summed over, and the others of b come behind those of a."""
    left, right = _LETTERS[: max(a.ndim - 1, 0)], _LETTERS[26 : 26 + max(b.ndim - 1, 0)]
    return contract(ctx, (f"{left}X", f"{right}X"), (a, b), left + right)


@rule(torch.linalg.vecdot)
def vecdot(ctx: Context, a: Labels, b: Labels, **kwargs: Any) -> Labels:
    """One axis is summed over, and the others meet."""
    if a.ndim != b.ndim:
        return ctx.opaque(f"of several ranks in {ctx.describe()}", a, b)  # type: ignore[no-any-return]
    letters, dim = _LETTERS[: a.ndim], ctx.call.get("dim") % a.ndim
    return contract(ctx, (letters, letters), (a, b), letters[:dim] + letters[dim + 1 :])


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
    """Axes of one letter are tied; a letter that the output lacks is read."""
    inputs = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    terms, output = terms_of(equation, inputs)
    return contract(ctx, terms, inputs, output)


def contract(
    ctx: Context, terms: Sequence[str], inputs: Sequence[Labels], output: str, *, tag: str = "",
    constant: Sequence[bool] | None = None,
) -> Labels:  # fmt: skip
    """The sum over every letter that `output` lacks of the product of the inputs; `terms` name the axes of each.

    Summed axes are read. Where heads and the places in them form a grid, either whole heads are removed from all inputs
    or the same places of every head; a head that is left after the sum has a label of its own. `constant` says which
    inputs depend on no input of the model, where they are not values of nodes; those that are looked up among several
    are weights, too.
    """
    constant = constant or [ctx.is_constant(x) for x in inputs]
    weights = [fixed or ctx.is_looked_up(x) for x, fixed in zip(inputs, constant, strict=True)]
    letters = output + "".join(sorted(set("".join(terms)) - set(output)))
    if any(len(set(term)) < len(term) for term in terms):
        kept: Labels = ctx.opaque(f"a diagonal is taken by {ctx.describe()}", list(inputs))
        return kept
    pairs = list(zip(terms, inputs, strict=True))
    aligned = [_aligned(x, term, letters) for term, x in pairs]
    sizes = [[x.shape[term.index(c)] if c in term else 1 for c in letters] for term, x in pairs]
    rank = len(output)
    summed = frozenset(range(rank, len(letters)))
    planes = []
    for axes in clusters(aligned):
        meeting = Meeting(axes, aligned, sizes, summed, f"{tag}left", ctx.by_heads)
        merged = ctx.merge(meeting)
        if merged is not None:  # the summed axes have size 1 in it
            planes.append(Plane(merged.core.reshape(merged.core.shape[:rank]), merged.axes))
        for axis in summed & set(axes):
            _read(ctx, meeting, axis, [(x, term.find(letters[axis])) for term, x in pairs], constant, weights)
    if sum(not is_weight for is_weight in weights) > 1:
        for plane in (plane for planes in aligned for plane in planes):
            ctx.attend(plane.core.reshape(-1))
    for x, own, is_weight in zip(inputs, aligned, weights, strict=True):
        if is_weight and x.planes:  # a weight produces its channels along the axes that are not summed
            cores = [plane.core.reshape(-1) for plane in own if not summed & set(plane.axes)]
            ctx.produce(torch.cat([torch.empty(0, dtype=torch.float64), *cores]), ctx.site(x))
    widths = [[size[axis] for size in sizes] for axis in range(rank)]
    return Labels(tuple(max(width) if all(width) else 0 for width in widths), tuple(planes))


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


def _read(
    ctx: Context, meeting: Meeting, axis: int, places: Sequence[tuple[Labels, int]], *orders: Sequence[bool]
) -> None:
    """Read a summed axis on the first input that depends on the model's inputs, and is no weight if there is one."""
    holders = [
        (order, plane, place)
        for planes, place, *order in zip(meeting.inputs, places, *orders, strict=True)
        for plane in planes
        if axis in plane.axes
    ]
    _, plane, (x, dim) = min(holders, key=lambda holder: holder[0])
    rows = plane.slices(axis)
    ctx.read(x, dim, rows[:, 0], across=rows if rows.shape[1] > 1 else None)


def terms_of(equation: str, inputs: list[Labels]) -> tuple[list[str], str]:
    """The letters of the axes of every input and of the output, with ellipses and an implicit output spelled out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [letter for letter in reversed(_LETTERS) if letter not in equation]
    widths = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, inputs, strict=True)]
    widest = max(width if "..." in term else 0 for term, width in zip(terms, widths, strict=True))
    spelled = [t.replace("...", "".join(spare[widest - w : widest])) for t, w in zip(terms, widths, strict=True)]
    if not arrow:
        letters = "".join(spelled)
        output = "..." * bool(widest) + "".join(sorted(c for c in set(left) - set(",.") if letters.count(c) == 1))
    return spelled, output.replace("...", "".join(spare[:widest]))


@rule(nn.Bilinear, torch.bilinear, torch.outer, torch.kron, torch.tensordot, torch.cdist, torch.cov, torch.corrcoef)
@rule("outer", "cov", torch.dist, torch.linalg.cross)
def outer(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Products of every channel with every other: no channel can be removed alone."""
    return ctx.opaque(f"every channel meets every other in {ctx.describe()}", labels_in((args, kwargs)))
