"""Operations that mix the entries along some axes in a way that no removal repeats: the channels of other axes pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.movement import move
from fxprune.rules.table import Key, rule


def passed(ctx: Context, x: Labels, dims: Iterable[int]) -> tuple[Plane, ...]:
    """The planes beside some axes; the channels along these are kept."""
    dims = {dim % max(x.ndim, 1) for dim in dims}
    for plane in x.planes:
        if dims & set(plane.axes):
            ctx.freeze(plane.core, f"lies along an axis that {ctx.describe()} mixes")
    return x.beside(*dims)


def _named(home: Any, *names: str) -> list[Key]:
    """Functions of a module, and the methods of tensors that have their names."""
    functions: list[Key] = [getattr(home, name) for name in names if hasattr(home, name)]
    return functions + ([name for name in names if hasattr(Tensor, name)] if home is torch else [])


_FFTS = ("fft", "rfft", "hfft")
_SHIFTS = ("fftshift", "ifftshift")
_ALL_FFTS = [f"{i}{name}{nd}" for name in _FFTS for i in ("", "i") for nd in ("", "2", "n")]


@rule(*_named(torch.fft, *_ALL_FFTS, *_SHIFTS), *_named(torch, "diff", "cumulative_trapezoid"))
def along(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """One tensor, some of whose axes are transformed, and may get another length."""
    dim, lengths = ctx.call.get("dim"), ctx.call.get("s")
    every = range(x.ndim) if lengths is None else range(-len(lengths), 0)
    dims = {d % x.ndim for d in (every if dim is None else (dim,) if isinstance(dim, int) else dim)}
    tensors = [x, *labels_in((args, kwargs))]
    if any(other.ndim != x.ndim for other in tensors):
        return ctx.opaque(f"joined by {ctx.describe()}", tensors)
    rows = [Labels(_ones_at(dims, other.shape), passed(ctx, other, dims)) for other in tensors]
    met = ctx.meet(rows, rows[0].shape)
    return Labels(tuple(ctx.spec().shape[a] if a in dims else size for a, size in enumerate(met.shape)), met.planes)


def _ones_at(dims: Collection[int], shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if axis in dims else size for axis, size in enumerate(shape))


@rule("unfold", torch.diagonal, "diagonal", torch.linalg.diagonal)
def windows(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """A data movement along axes without channels."""
    names = ("dimension",) if ctx.node.target == "unfold" else ("dim1", "dim2")
    planes = passed(ctx, x, [ctx.call.get(name) for name in names])
    return move(ctx, Labels(x.shape, planes), *args, **kwargs)


@rule(*_named(torch, "stft", "istft"))
def spectrogram(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """A sequence, the last axis, becomes bins and frames, or these a sequence; a batch of sequences lies in front."""
    batch = x.ndim - (1 if ctx.node.target in ("stft", torch.stft) else 2)
    shape = (*x.shape[:batch], *ctx.spec().shape[batch:])
    for window in labels_in((args, kwargs)):
        passed(ctx, window, range(window.ndim))
    return Labels(shape, tuple(_beside(p, batch, len(shape)) for p in passed(ctx, x, range(batch, x.ndim))))


def _beside(plane: Plane, batch: int, ndim: int) -> Plane:
    """A plane with labels along the first `batch` axes only, of a tensor of another rank."""
    return Plane(plane.core.reshape(*plane.core.shape[:batch], *(1,) * (ndim - batch)), plane.axes)


@rule(*_named(torch, "quantile", "nanquantile"))
def quantile(ctx: Context, x: Labels, q: Any, *args: Any, **kwargs: Any) -> Any:
    """A statistic along one axis, or all; of several quantiles, each has a row of its own in front."""
    dim, keepdim = ctx.call.get("dim"), ctx.call.get("keepdim")
    dims = set(range(x.ndim) if dim is None else (dim % x.ndim,))
    planes = ctx.statistic(x, dims).beside(*dims)
    bare = torch.empty(x.shape, device="meta").amax(tuple(dims), keepdim)
    kept = [axis for axis in range(x.ndim) if axis not in dims or keepdim]
    by = len(ctx.spec().shape) - bare.ndim
    moved = [Plane(p.core.reshape([p.core.shape[a] for a in kept]), tuple(map(kept.index, p.axes))) for p in planes]
    return Labels((*ctx.spec().shape[:by], *bare.shape), tuple(plane.shifted(by) for plane in moved))


_OF_MATRICES = (
    "inv", "pinv", "matrix_exp", "matrix_power", "cholesky", "det", "slogdet", "qr", "svd", "svdvals", "eigh",
    "eigvalsh", "matrix_norm",
)  # fmt: skip


@rule(*_named(torch.linalg, *_OF_MATRICES), *_named(torch, "inverse", "det", "logdet", "slogdet", "matrix_exp"))
def matrices(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """Each matrix of a batch by itself."""
    others = [other for other in labels_in((args, kwargs)) if other.planes]
    if others:
        return ctx.opaque(f"joined by {ctx.describe()}", x, others)
    planes, batch = passed(ctx, x, (-2, -1)), x.ndim - 2

    def result(spec: TensorSpec) -> Labels:
        ones = (1,) * (len(spec.shape) - batch)
        kept = tuple(Plane(p.core.reshape(*p.core.shape[:batch], *ones), p.axes) for p in planes)
        return Labels((*x.shape[:batch], *spec.shape[batch:]), kept)

    return pytree.tree_map_only(TensorSpec, result, ctx.spec())


@rule(torch.linalg.solve, torch.linalg.solve_triangular)
def solve(ctx: Context, own: Labels, other: Labels, *args: Any, **kwargs: Any) -> Any:
    """Each of the right-hand sides by itself, if these are matrices beside each other."""
    if own.ndim != other.ndim or ctx.call.get("left") is False or not isinstance(ctx.spec(), TensorSpec):
        return ctx.opaque(f"mixed by {ctx.describe()}", own, other)
    matrix = Labels((*own.shape[:-2], 1, 1), passed(ctx, own, (-2, -1)))
    sides = Labels((*other.shape[:-2], 1, other.shape[-1]), passed(ctx, other, (-2,)))
    met = ctx.meet((matrix, sides), torch.broadcast_shapes(matrix.shape, sides.shape))
    return Labels((*met.shape[:-2], other.shape[-2], met.shape[-1]), met.planes)
