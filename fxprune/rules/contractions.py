"""Products of two tensors that sum over an axis: the axis is read, the others go through."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.labels import NO_CHANNEL, Labels, Plane, vector_plane
from fxprune.rules.context import Context, labels_in
from fxprune.rules.table import rule


@rule(operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.mv, "matmul", "bmm", "mm", "mv", "__matmul__")
def matmul(ctx: Context, a: Labels, b: Labels) -> Labels:
    """Rows of a by columns of b; batch axes meet as in an element-wise op."""
    last, inner = a.ndim - 1, max(b.ndim - 2, 0)
    if ctx.is_constant(a):
        ctx.tie(ctx.vector(a, last), ctx.consume(b, inner))
        ctx.produce(_labels(a.beside(last)), ctx.site(a))
    else:
        ctx.tie(ctx.consume(a, last), ctx.vector(b, inner))
        if ctx.is_constant(b):
            ctx.produce(_labels(b.beside(inner)), ctx.site(b))
    left = _unit_axis(_unsqueezed(a, 0) if a.ndim == 1 else a, -1)
    right = _unit_axis(_unsqueezed(b, 1) if b.ndim == 1 else b, -2)
    met = ctx.meet((left, right), torch.broadcast_shapes(left.shape, right.shape))
    met = _squeezed(met, met.ndim - 2) if a.ndim == 1 else met
    return _squeezed(met, met.ndim - 1) if b.ndim == 1 else met


@rule(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def addmm(ctx: Context, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> Labels:
    """Bias + a b."""
    product = matmul(ctx, a, b)
    return ctx.meet((bias, product), product.shape)


@rule(torch.einsum)
def einsum(ctx: Context, equation: str, *operands: Any) -> Labels:
    """Axes of one letter are tied; a letter that the output lacks is read, the others go through."""
    inputs = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    terms, output = _terms(equation, inputs)
    sizes: dict[str, int] = {}
    for term, x in zip(terms, inputs, strict=True):
        sizes |= dict(zip(term, x.shape, strict=True))
    planes = []
    for letter in sizes:
        vector = _tied_letter(ctx, letter, terms, inputs, read=letter not in output)
        if letter in output and vector is not None:
            planes.append(vector_plane(vector, output.index(letter), len(output)))
    for x in inputs:
        if ctx.is_constant(x):
            ctx.produce(_labels(x.planes), ctx.site(x))
    return Labels(tuple(sizes[letter] for letter in output), tuple(planes))


def _tied_letter(ctx: Context, letter: str, terms: list[str], inputs: list[Labels], *, read: bool) -> Tensor | None:
    """Tie the axes of one letter; returns their labels, or None where there are none."""
    holders = [(term, x) for term, x in zip(terms, inputs, strict=True) if letter in term]
    holders.sort(key=lambda holder: ctx.is_constant(holder[1]))
    vectors = []
    for index, (term, x) in enumerate(holders):
        look = ctx.consume if read and index == 0 else ctx.vector
        vectors += [look(x, axis) for axis, other in enumerate(term) if other == letter]
    for other in vectors[1:]:
        ctx.tie(vectors[0], other)
    return vectors[0] if bool((vectors[0] != NO_CHANNEL).any()) else None


def _terms(equation: str, inputs: list[Labels]) -> tuple[list[str], str]:
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


def _labels(planes: tuple[Plane, ...]) -> Tensor:
    """All labels of some planes, in one vector."""
    return torch.cat([torch.empty(0, dtype=torch.float64), *(plane.core.reshape(-1) for plane in planes)])


def _unsqueezed(x: Labels, dim: int) -> Labels:
    """A vector as a matrix of one row or one column."""
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return Labels(shape, tuple(vector_plane(p.core.reshape(-1), int(dim == 0), 2) for p in x.planes))


def _unit_axis(x: Labels, dim: int) -> Labels:
    """The value with axis `dim` of size 1 and without the planes along it."""
    dim %= x.ndim
    return Labels((*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.beside(dim))


def _squeezed(x: Labels, dim: int) -> Labels:
    """The value without the axis `dim`, of size 1."""
    planes = (Plane(p.core.squeeze(dim), tuple(a - (a > dim) for a in p.axes)) for p in x.beside(dim))
    return Labels((*x.shape[:dim], *x.shape[dim + 1 :]), tuple(planes))
