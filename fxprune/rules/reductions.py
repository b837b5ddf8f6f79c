"""Operations across an axis: reductions, softmax, sorting, pooling over positions, resampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.choices import compare, largest
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane, core_of, vector_plane
from fxprune.rules.table import rule

_REDUCTIONS = (
    "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "norm", "logsumexp", "median",
    "nanmean", "argmax", "argmin", "all", "any", "sum", "nansum", "nanmedian", "count_nonzero", "aminmax", "kthvalue",
    "mode", "trapezoid",
)  # fmt: skip
_LARGEST = (torch.max, "max", torch.argmax, "argmax")


@rule(*(getattr(torch, name) for name in _REDUCTIONS), *(name for name in _REDUCTIONS if hasattr(Tensor, name)))
@rule(torch.linalg.norm, torch.linalg.vector_norm)
def reduce(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """A sum reads the channels that it runs over; any other reduction over channels keeps all of them.

    Where only some axes of a grid are reduced, the labels that are reduced together are tied.
    """
    second = labels_in((args, kwargs))
    if second:
        return ctx.meet((x, *second), torch.broadcast_shapes(x.shape, second[0].shape))
    dims, keepdim = _reduced_axes(ctx, x)
    if ctx.node.target in _LARGEST and ctx.call.get("dim") is not None and [p.axes for p in x.along(dims[0])] == [dims]:
        return largest(ctx, x, dims[0], keepdim=keepdim)
    result = _over(ctx, x, dims, keepdim=keepdim)
    return pytree.tree_map_only(
        TensorSpec, lambda spec: result if len(spec.shape) == result.ndim else Labels(()), ctx.spec()
    )


def _over(ctx: Context, x: Labels, dims: tuple[int, ...], *, keepdim: bool) -> Labels:
    """The value of a reduction of `x` over the axes `dims`."""
    planes = [plane for plane in (_reduced(ctx, x, plane, dims) for plane in x.planes) if plane is not None]
    bare = torch.empty(x.shape, device="meta").sum(dims, keepdim)
    return Labels(tuple(bare.shape), tuple(plane if keepdim else _without(plane, dims) for plane in planes))


@rule(F.cosine_similarity, F.pairwise_distance)
def similarity(ctx: Context, x1: Labels, x2: Labels, *args: Any, **kwargs: Any) -> Labels:
    """The tensors meet, and are reduced along `dim`, the last axis of a distance."""
    x = ctx.meet((x1, x2), torch.broadcast_shapes(x1.shape, x2.shape))
    dim = ctx.call.get("dim") if ctx.node.target is F.cosine_similarity else -1
    return _over(ctx, x, (dim % x.ndim,), keepdim=bool(ctx.call.get("keepdim")))


_LOSSES = ("MSE", "L1", "SmoothL1", "Huber", "CrossEntropy", "NLL", "BCEWithLogits")
_LOSS_FUNCTIONS = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.cross_entropy, F.nll_loss,
    F.binary_cross_entropy_with_logits,
)  # fmt: skip


@rule(*_LOSS_FUNCTIONS, *(getattr(nn, f"{name}Loss") for name in _LOSSES))
def loss(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """A loss that the forward computes of all that it is given."""
    return ctx.opaque(f"all channels enter the loss {ctx.describe()}", args, kwargs)


@rule(torch.renorm, "renorm", "renorm_")
def renorm(ctx: Context, x: Labels, p: float, dim: int, maxnorm: float) -> Labels:
    """The norm of each slice along `dim` is bounded."""
    return ctx.statistic(x, set(range(x.ndim)) - {dim % x.ndim})


def _reduced_axes(ctx: Context, x: Labels) -> tuple[tuple[int, ...], bool]:
    """The axes of the current reduction, and whether it keeps them as axes of size 1."""
    dim, first = ctx.call.get("dim"), pytree.tree_leaves(ctx.spec())[0]
    keepdim = isinstance(first, TensorSpec) and dim is not None and len(first.shape) == x.ndim
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    return tuple(sorted({d % x.ndim for d in dims})) if x.ndim else (), keepdim


def _reduced(ctx: Context, x: Labels, plane: Plane, dims: Sequence[int]) -> Plane | None:
    """The plane with its reduced axes narrowed to size 1, or None where all of its axes are reduced."""
    inside = [axis for axis in plane.axes if axis in dims]
    rest = tuple(axis for axis in plane.axes if axis not in dims)
    if not inside:
        return plane
    if rest:
        first = core_of(plane.core, rest)
        ctx.tie(first, plane.core)
        return Plane(first, rest)
    is_sum = ctx.node.target in ("sum", torch.sum) and not ctx.is_constant(x)  # the sum of a weight is a statistic
    if is_sum and len(inside) == 1 and len(x.along(inside[0])) == 1:
        ctx.consume(x, inside[0])
    else:
        ctx.inexact(x, plane, f"{ctx.describe()} takes a statistic over the channels")
    return None


def _without(plane: Plane, dims: Sequence[int]) -> Plane:
    """The plane of the tensor without the axes `dims`, which have size 1 in it."""
    kept = [d for d in range(plane.core.ndim) if d not in dims]
    core = plane.core.reshape([plane.core.shape[d] for d in kept])
    return Plane(core, tuple(kept.index(axis) for axis in plane.axes))


@rule(torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, F.softmin, F.normalize, F.gumbel_softmax)
@rule("softmax", "log_softmax", "cumsum", "sort", torch.cumsum, torch.sort, "cumsum_")
@rule("cumprod", "cumprod_", torch.cumprod, "cummax", torch.cummax, "cummin", torch.cummin)
@rule("logcumsumexp", torch.logcumsumexp, "argsort", torch.argsort)
@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
def normalise(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Channels are kept along an axis that is normalised or sorted; a grid is tied along it."""
    x = labels_in((args, kwargs))[0]
    axes = _normalised_axes(ctx, x)
    if _is_softmax(ctx) and [plane.axes for plane in x.along(axes[0])] == [axes]:
        compare(ctx, x, axes[0], f"{ctx.describe()} takes a statistic over the channels", statistic=True)
        return x
    passed = ctx.statistic(x, axes)
    outputs = pytree.tree_leaves(ctx.spec())
    if any(spec.shape != tuple(ctx.spec(ctx.source(x)).shape) for spec in outputs):
        return ctx.opaque(f"ordered by {ctx.describe()}", x)
    return pytree.tree_map_only(TensorSpec, lambda spec: passed, ctx.spec())


def _is_softmax(ctx: Context) -> bool:
    """Whether the current node is a softmax, in which a channel of minus infinity plays no part."""
    target = type(ctx.module()) if ctx.node.op == "call_module" else ctx.node.target
    return target in (torch.softmax, F.softmax, "softmax", nn.Softmax)


def _normalised_axes(ctx: Context, x: Labels) -> tuple[int, ...]:
    """The axes along which the current node normalises or sorts; torch's own choice for a softmax without `dim`."""
    if ctx.node.op == "call_module":
        module: Any = ctx.module()
        dim = -3 if isinstance(module, nn.Softmax2d) else module.dim
    else:
        dim = ctx.call.get("dim")
    dim = dim if dim is not None else int(x.ndim not in (0, 1, 3))
    return tuple(axis % max(x.ndim, 1) for axis in ((dim,) if isinstance(dim, int) else dim))


def over_positions(ctx: Context, *args: Any, nd: int, **kwargs: Any) -> Any:
    """Pooling and resampling: each channel by itself, over its `nd` axes of positions.

    Labels along positions are tied to their channel, or frozen where they have none.
    """
    x, *others = labels_in((args, kwargs))
    axis = x.ndim - nd - 1
    through = list(x.beside(*range(axis + 1, x.ndim)))
    for plane in (plane for plane in x.planes if max(plane.axes) > axis):
        if min(plane.axes) == axis:
            through.append(vector_plane(ctx.vector(x, axis), axis, x.ndim))
        else:
            ctx.freeze(plane.core, f"lies along the positions that {ctx.describe()} runs over")
    for other in others:
        ctx.meet((x, other if other.ndim == x.ndim else _beside_positions(other, axis, nd)), x.shape)

    def result(spec: TensorSpec) -> Labels:
        return Labels((*x.shape[: axis + 1], *spec.shape[axis + 1 :]), tuple(through))

    return pytree.tree_map_only(TensorSpec, result, ctx.spec())


def _beside_positions(x: Labels, axis: int, nd: int) -> Labels:
    """Numbers of every channel, such as the samples of a random pool, with `nd` axes of one position each."""
    planes = x.beside(*range(axis + 1, x.ndim))
    shape = (*x.shape[: axis + 1], *[1] * nd)
    return Labels(shape, tuple(Plane(p.core.reshape(*p.core.shape[: axis + 1], *[1] * nd), p.axes) for p in planes))


_POOLS = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool", "fractional_max_pool", "max_unpool",
)  # fmt: skip
for _nd in (1, 2, 3):
    for _name in _POOLS:
        _suffixes = (f"{_name}{_nd}d", f"{_name}{_nd}d_with_indices")
        _homes = (F, torch, torch._C._nn)
        _found = {getattr(home, name) for home in _homes for name in _suffixes if hasattr(home, name)}
        _class = "".join(part.capitalize() for part in _name.split("_")).replace("Lp", "LP") + f"{_nd}d"
        _found |= {getattr(nn, _class)} if hasattr(nn, _class) else set()
        rule(*_found)(partial(over_positions, nd=_nd))


@rule(F.interpolate, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
@rule(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d)
@rule(nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def resample(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Positions are resampled; a module's name or the rank of the input gives the number of their axes."""
    x = labels_in((args, kwargs))[0]
    if ctx.node.op == "call_module" and type(args[0]).__name__[-2:] in ("1d", "2d", "3d"):
        return over_positions(ctx, x, nd=int(type(args[0]).__name__[-2]))
    return over_positions(ctx, x, nd=x.ndim - 2)


@rule(F.grid_sample)
def grid_sample(ctx: Context, x: Labels, grid: Labels, *args: Any, **kwargs: Any) -> Any:
    """Positions are looked up by coordinates: two or three numbers, which are no channels."""
    for plane in grid.planes:
        ctx.freeze(plane.core, f"gives {ctx.describe()} its coordinates")
    return over_positions(ctx, x, nd=x.ndim - 2)
