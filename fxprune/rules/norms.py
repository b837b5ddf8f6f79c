"""Normalisation by statistics of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Option


@rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(ctx: Context, module: Any, x: Labels) -> Labels:
    """The normalisation by the module's own parameters."""
    return layer_norm(ctx, x, module.normalized_shape, ctx.own("weight"), ctx.own("bias"))


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm(
    ctx: Context,
    x: Labels,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Labels:
    """A statistic over the last axes; what lies outside of them goes through."""
    first = x.ndim - len(normalized_shape)
    passed = ctx.statistic(x, range(first, x.ndim))
    parameters = [p for p in (weight, bias) if isinstance(p, Labels)]
    return ctx.meet([passed, *parameters], x.shape) if parameters else passed


@rule(nn.GroupNorm)
def group_norm_module(ctx: Context, module: nn.GroupNorm, x: Labels) -> Labels:
    """The normalisation by the module's own parameters."""
    return group_norm(ctx, x, module.num_groups, ctx.own("weight"), ctx.own("bias"))


@rule(F.group_norm, torch.group_norm)
def group_norm(
    ctx: Context, x: Labels, num_groups: int, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Labels:
    """A statistic over each group of channels: whole groups leave, as long as there are several."""
    size = ctx.remember("size", x.shape[1] // num_groups)
    if ctx.remember("groups", num_groups) > 1:
        rows = ctx.vector(x, 1).reshape(-1, size)
        ctx.choose([Option(((rows[:, :1], rows),))], ordered=True)
        passed = ctx.statistic(x, range(2, x.ndim))
    else:
        passed = ctx.statistic(x, range(1, x.ndim))
    spread = [_channels(p, x.ndim) for p in (weight, bias) if isinstance(p, Labels)]
    return ctx.meet([passed, *spread], x.shape) if spread else passed


def _channels(parameter: Labels, rank: int) -> Labels:
    """A parameter with one entry a channel, as it meets a tensor of the given rank."""
    ones = (1,) * (rank - 2)
    planes = (type(p)(p.core.reshape(-1, *ones), (0,)) for p in parameter.planes)
    return Labels((*parameter.shape, *ones), tuple(planes))


@rule(nn.LocalResponseNorm, nn.CrossMapLRN2d)
def local_response_norm_module(ctx: Context, module: nn.Module, x: Labels) -> Labels:
    """The normalisation by neighbouring channels."""
    return local_response_norm(ctx, x)


@rule(F.local_response_norm)
def local_response_norm(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """A statistic over neighbouring channels."""
    return ctx.statistic(x, (1,))
