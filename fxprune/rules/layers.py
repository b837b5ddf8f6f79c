"""Layers with weights: they read the labels of their input channels and produce those of their output channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.rules.context import Context, labels_in
from fxprune.rules.contractions import contract
from fxprune.rules.labels import Labels, labelled
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Option, Slot

_ROWS = "abcdefghijklmnop"  # names for the axes that a linear layer does not read


@rule(F.linear)
def linear(ctx: Context, x: Labels, weight: Any, bias: Any = None) -> Labels:
    """X W^T + b: the last axis is read; the channels of every other axis pass."""
    last = x.ndim - 1
    if any(len(plane.axes) > 1 for plane in x.along(last)):
        rows = _ROWS[:last]
        product = contract(ctx, (f"{rows}Y", "ZY"), (x, weight), f"{rows}Z")
        return product if bias is None else ctx.meet((product, bias), product.shape)
    ctx.tie(ctx.consume(x, last), ctx.vector(weight, 1))
    outputs = _outputs(ctx, weight, bias, ctx.vector(weight, 0))
    return Labels((*x.shape[:-1], len(outputs)), (*labelled(outputs, last, x.ndim), *x.beside(last)))


def _outputs(ctx: Context, weight: Any, bias: Any, outputs: Tensor) -> Tensor:
    """The labels of a layer's output channels, tied to its bias and produced by it."""
    if bias is not None:
        ctx.tie(outputs, ctx.vector(bias, 0))
    ctx.produce(outputs, ctx.site(weight))
    return outputs


def convolve(
    ctx: Context, x: Labels, weight: Any, bias: Any = None, *rest: Any, nd: int, transposed: bool, groups: int = 1,
    **kwargs: Any,
) -> Labels:  # fmt: skip
    """Convolutions and their transposes, of `nd` spatial axes: dense, grouped or depthwise."""
    groups = rest[3] if len(rest) > 3 else groups
    axis = x.ndim - nd - 1
    inputs = ctx.vector(x, axis)
    if not ctx.is_constant(weight) and _holds_samples(ctx, inputs, groups):
        ctx.freeze(inputs, f"the channels of all samples lie along one axis in {ctx.describe()}")
    outputs = _channels(ctx, inputs, weight, groups, transposed=transposed)
    first = outputs.reshape(groups, -1)[:, :1] if groups > 1 else None
    through = None if first is None else first.expand(-1, len(inputs) // groups).reshape(-1)
    ctx.read(x, axis, inputs, through=through)
    _outputs(ctx, weight, bias, outputs)
    for plane in x.planes:
        if any(dim > axis for dim in plane.axes) and axis not in plane.axes:
            ctx.freeze(plane.core, f"lies along the positions that {ctx.describe()} runs over")
    shape = (*x.shape[:axis], len(outputs), *ctx.spec().shape[axis + 1 :])
    return Labels(shape, (*labelled(outputs, axis, x.ndim), *x.beside(*range(axis, x.ndim))))


def _holds_samples(ctx: Context, inputs: Tensor, groups: int) -> bool:
    """Whether a convolution with a computed weight has one or several groups for each sample."""
    given = ctx.node.kwargs.get("groups", dict(enumerate(ctx.node.args)).get(6))
    return len(inputs.unique()) < len(inputs) if groups > 1 else isinstance(given, fx.Node)


def _channels(ctx: Context, inputs: Tensor, weight: Labels, groups: int, *, transposed: bool) -> Tensor:
    """Tie a convolution's input channels to its weight; gives the labels of its output channels."""
    if ctx.remember("groups", groups) == 1:
        ctx.tie(inputs, ctx.vector(weight, int(not transposed)))
        return ctx.vector(weight, int(transposed))
    slots, outputs = ctx.vector(weight, 1), ctx.vector(weight, 0)
    if transposed:
        ctx.tie(inputs, outputs)
        outputs = ctx.fresh(Slot(ctx.site(weight), "out"), groups * weight.shape[1])
    _keep_rectangular(ctx, inputs.reshape(groups, -1), outputs.reshape(groups, -1), slots, transposed=transposed)
    return outputs


def _keep_rectangular(ctx: Context, inputs: Tensor, outputs: Tensor, slots: Tensor, *, transposed: bool) -> None:
    """Remove whole groups of a grouped layer (rows of both grids), or the same slots of every group (columns).

    `slots` are the labels of axis 1 of the weight, shared by all groups: the inputs of a group, or the outputs of a
    transpose. A depthwise layer has one slot; only groups of it are removed.
    """
    if ctx.remember("slots", len(slots)) == 1:
        ctx.tie(inputs[:, :1], torch.cat([inputs, outputs], 1))
        return
    rows = Option(((inputs[:, :1], inputs), (outputs[:, :1], outputs), (inputs[:, 0], outputs[:, 0])), (slots,))
    shared = outputs if transposed else inputs
    columns = Option(((inputs[:1], inputs), (outputs[:1], outputs), (shared[0], slots)))
    ctx.choose([rows, columns])


def _convolve_module(ctx: Context, module: Any, x: Labels, *sizes: Any, **options: Any) -> Labels:
    return convolve(ctx, x, ctx.own("weight"), ctx.own("bias"), groups=module.groups, **options)


for _nd in (1, 2, 3):
    for _transposed, _name in ((False, f"conv{_nd}d"), (True, f"conv_transpose{_nd}d")):
        _class = getattr(nn, f"ConvTranspose{_nd}d" if _transposed else f"Conv{_nd}d")
        rule(getattr(F, _name))(partial(convolve, nd=_nd, transposed=_transposed))
        rule(_class)(partial(_convolve_module, nd=_nd, transposed=_transposed))


@rule(nn.Linear)
def linear_module(ctx: Context, module: nn.Linear, x: Labels) -> Labels:
    """The layer of the module's own parameters."""
    return linear(ctx, x, ctx.own("weight"), ctx.own("bias"))


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def batch_norm_module(ctx: Context, module: nn.Module, x: Labels) -> Labels:
    """Statistics of the module or of the input, and affine parameters, of each channel by itself."""
    mean, *others = (ctx.own(name) for name in ("running_mean", "running_var", "weight", "bias"))
    ndim = {"1": 3, "2": 4, "3": 5}.get(type(module).__name__[-2], 0)
    by_sample = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    axis = 0 if by_sample and x.ndim < ndim else 1  # an InstanceNorm accepts one sample without a batch axis
    x = _of_input(ctx, x, axis, by_sample=by_sample) if mean is None else x
    return channelwise(ctx, x, mean, *others, axis=axis)


@rule(F.batch_norm, F.instance_norm)
def batch_norm(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """Statistics that are given or of the input, and affine parameters, of each channel by itself."""
    parameters = labels_in((args, kwargs))
    if ctx.call.get("training") or ctx.call.get("use_input_stats"):
        x = _of_input(ctx, x, 1, by_sample=ctx.node.target is F.instance_norm)
    return channelwise(ctx, x, *parameters)


def _of_input(ctx: Context, x: Labels, axis: int, *, by_sample: bool) -> Labels:
    """The value after a statistic of each channel over its positions, and over samples unless `by_sample`."""
    return ctx.statistic(x, {*range(x.ndim)} - {*range(axis + 1 if by_sample else 0), axis})


def channelwise(ctx: Context, x: Labels, *parameters: Labels | None, axis: int = 1) -> Labels:
    """Tie parameters with one entry for each channel to the channels, which pass."""
    labels = ctx.vector(x, axis)
    for parameter in parameters:
        if parameter is not None:
            ctx.tie(labels, ctx.vector(parameter, 0))
    return x
