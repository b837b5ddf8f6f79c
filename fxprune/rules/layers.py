"""Layers with weights: they read the labels of their input channels and give those of their output channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.rules.context import Context
from fxprune.rules.contractions import contract
from fxprune.rules.labels import NO_CHANNEL, Labels, vector_plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Option, Slot

_ROWS = "abcdefghijklmnop"  # names for the axes that a linear layer leaves as they are


@rule(nn.Linear)
def linear_module(ctx: Context, module: nn.Linear, x: Labels) -> Labels:
    """The layer of the module's own parameters."""
    return linear(ctx, x, ctx.own("weight"), ctx.own("bias"))


@rule(F.linear)
def linear(ctx: Context, input: Any, weight: Any, bias: Any = None) -> Labels:  # noqa: A002 - torch's name
    """X W^T + b: the last axis is read; every other axis goes through."""
    last = input.ndim - 1
    if any(len(plane.axes) > 1 for plane in input.along(last)):
        rows = _ROWS[:last]
        product = contract(ctx, (f"{rows}Y", "ZY"), (input, weight), f"{rows}Z")
        return product if bias is None else ctx.meet((product, bias), product.shape)
    ctx.tie(ctx.consume(input, last), ctx.vector(weight, 1))
    outputs = ctx.vector(weight, 0)
    _bias(ctx, bias, outputs)
    ctx.produce(outputs, ctx.site(weight))
    shape = (*input.shape[:-1], len(outputs))
    return Labels(shape, (*_labelled(outputs, last, len(shape)), *input.beside(last)))


def convolve_module(ctx: Context, module: Any, x: Labels, *sizes: Any, nd: int, transposed: bool) -> Labels:
    """The layer of the module's own parameters."""
    return convolve(ctx, x, ctx.own("weight"), ctx.own("bias"), groups=module.groups, nd=nd, transposed=transposed)


def convolve(
    ctx: Context,
    input: Any,  # noqa: A002 - torch's name
    weight: Any,
    bias: Any = None,
    *rest: Any,
    nd: int,
    transposed: bool,
    groups: int = 1,
    **kwargs: Any,
) -> Labels:
    """Convolutions and their transposes, of `nd` spatial axes, dense, grouped or depthwise."""
    groups = rest[3] if len(rest) > 3 else groups
    axis = input.ndim - nd - 1
    inputs = ctx.vector(input, axis)
    if not ctx.is_constant(weight) and _holds_samples(ctx, inputs, groups):
        ctx.freeze(inputs, f"the channels of all samples lie along one axis in {ctx.describe()}")
    outputs = _channels(ctx, inputs, weight, groups, transposed=transposed)
    first = outputs.reshape(groups, -1)[:, :1] if groups > 1 else None
    through = None if first is None else first.expand(-1, len(inputs) // groups).reshape(-1)
    ctx.read(input, axis, inputs, through=through)
    _bias(ctx, bias, outputs)
    ctx.produce(outputs, ctx.site(weight))
    for plane in input.planes:
        if any(dim > axis for dim in plane.axes) and axis not in plane.axes:
            ctx.freeze(plane.core, f"lies along the positions that {ctx.describe()} runs over")
    shape = (*input.shape[:axis], len(outputs), *ctx.spec().shape[axis + 1 :])
    beside = input.beside(*range(axis, input.ndim))
    return Labels(shape, (*_labelled(outputs, axis, len(shape)), *beside))


def _holds_samples(ctx: Context, inputs: Tensor, groups: int) -> bool:
    """Whether a convolution whose weight is computed has a group, or several, for each sample."""
    given = ctx.node.kwargs.get("groups", dict(enumerate(ctx.node.args)).get(6))
    return len(inputs.unique()) < len(inputs) if groups > 1 else isinstance(given, fx.Node)


def _channels(ctx: Context, inputs: Tensor, weight: Labels, groups: int, *, transposed: bool) -> Tensor:
    """Tie a convolution's input channels to its weight; returns the labels of its output channels."""
    if ctx.remember("groups", groups) == 1:
        ctx.tie(inputs, ctx.vector(weight, int(not transposed)))
        return ctx.vector(weight, int(transposed))
    slots, outer = ctx.vector(weight, 1), ctx.vector(weight, 0)
    if transposed:
        ctx.tie(inputs, outer)
        outputs = ctx.fresh(Slot(ctx.site(weight), "out"), groups * weight.shape[1])
    else:
        outputs = outer
    _keep_rectangular(ctx, inputs.reshape(groups, -1), outputs.reshape(groups, -1), slots, transposed=transposed)
    return outputs


def _keep_rectangular(ctx: Context, inputs: Tensor, outputs: Tensor, slots: Tensor, *, transposed: bool) -> None:
    """A grouped layer loses whole groups (rows of both grids), or the same slots of every group (columns).

    `slots` labels axis 1 of the weight, which all groups share: the inputs of a group, or its outputs in a transpose.
    A depthwise layer has one slot, and loses groups.
    """
    if ctx.remember("slots", len(slots)) == 1:
        ctx.tie(inputs[:, :1], torch.cat([inputs, outputs], 1))
        return
    rows = Option(((inputs[:, :1], inputs), (outputs[:, :1], outputs), (inputs[:, 0], outputs[:, 0])), (slots,))
    shared = outputs if transposed else inputs
    columns = Option(((inputs[:1], inputs), (outputs[:1], outputs), (shared[0], slots)))
    ctx.choose([rows, columns])


for _nd in (1, 2, 3):
    for _transposed, _name in ((False, f"conv{_nd}d"), (True, f"conv_transpose{_nd}d")):
        _class = getattr(nn, f"ConvTranspose{_nd}d" if _transposed else f"Conv{_nd}d")
        rule(getattr(F, _name))(partial(convolve, nd=_nd, transposed=_transposed))
        rule(_class)(partial(convolve_module, nd=_nd, transposed=_transposed))


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def batch_norm_module(ctx: Context, module: nn.Module, x: Labels) -> Labels:
    """Statistics, those of the input where there are no others, and affine parameters of each channel by itself."""
    mean, *others = (ctx.own(name) for name in ("running_mean", "running_var", "weight", "bias"))
    ndim = {"1": 3, "2": 4, "3": 5}.get(type(module).__name__[-2], 0)
    by_sample = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    axis = 0 if by_sample and x.ndim < ndim else 1  # an InstanceNorm may be given one sample alone
    x = _of_input(ctx, x, axis, by_sample=by_sample) if mean is None else x
    return channelwise(ctx, x, mean, *others, axis=axis)


@rule(F.batch_norm, F.instance_norm)
def batch_norm(
    ctx: Context,
    input: Any,  # noqa: A002 - torch's name
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Labels:
    """Statistics, those of the input where that is asked for, and affine parameters of each channel by itself."""
    if ctx.call.get("training") or ctx.call.get("use_input_stats"):
        input = _of_input(ctx, input, 1, by_sample=ctx.node.target is F.instance_norm)  # noqa: A001
    return channelwise(ctx, input, running_mean, running_var, weight, bias)


def _of_input(ctx: Context, x: Labels, axis: int, *, by_sample: bool) -> Labels:
    """A value of which each channel gets a statistic over its positions, and but `by_sample` over the samples too."""
    return ctx.statistic(x, {*range(x.ndim)} - {*range(axis + 1 if by_sample else 0), axis})


def channelwise(ctx: Context, x: Labels, *parameters: Labels | None, axis: int = 1) -> Labels:
    """Parameters with one entry a channel are tied to the channels, which go on."""
    labels = ctx.vector(x, axis)
    for parameter in parameters:
        if parameter is not None:
            ctx.tie(labels, ctx.vector(parameter, 0))
    return x


def _bias(ctx: Context, bias: Labels | None, outputs: Tensor) -> None:
    if bias is not None:
        ctx.tie(outputs, ctx.vector(bias, 0))


def _labelled(vector: Tensor, dim: int, ndim: int) -> tuple[Any, ...]:
    """The plane of a vector of labels, unless none of its slots is a channel."""
    return (vector_plane(vector, dim, ndim),) if bool((vector != NO_CHANNEL).any()) else ()
