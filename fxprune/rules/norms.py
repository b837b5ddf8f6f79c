"""Normalisation by statistics of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import rule
from fxprune.rules.vocabulary import Option


@rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(ctx: Context, module: Any, x: Labels) -> Labels:
    """The normalisation by the module's own parameters."""
    return layer_norm(ctx, x, module.normalized_shape, ctx.own("weight"), ctx.own("bias"))


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm(ctx: Context, x: Labels, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Labels:
    """A statistic over the last axes; the channels of other axes pass."""
    passed = ctx.statistic(x, range(x.ndim - len(normalized_shape), x.ndim))
    parameters = labels_in((args, kwargs))
    return ctx.meet([passed, *parameters], x.shape) if parameters else passed


@rule(nn.GroupNorm)
def group_norm_module(ctx: Context, module: nn.GroupNorm, x: Labels) -> Labels:
    """The normalisation by the module's own parameters."""
    return group_norm(ctx, x, module.num_groups, ctx.own("weight"), ctx.own("bias"))


@rule(F.group_norm, torch.group_norm)
def group_norm(ctx: Context, x: Labels, num_groups: int, *args: Any, **kwargs: Any) -> Labels:
    """A statistic over each group of channels: whole groups are removed where there are several."""
    size = ctx.remember("size", x.shape[1] // num_groups)
    several = ctx.remember("groups", num_groups) > 1
    if several:
        rows = ctx.vector(x, 1).reshape(-1, size)
        ctx.choose([Option(((rows[:, :1], rows),))], ordered=True)
    passed = ctx.statistic(x, range(2 if several else 1, x.ndim))
    ones = (1,) * (x.ndim - 2)  # one entry of a parameter for each channel meets the axes of positions
    spread = [
        Labels((*p.shape, *ones), tuple(Plane(plane.core.reshape(-1, *ones), (0,)) for plane in p.planes))
        for p in labels_in((args, kwargs))
    ]
    return ctx.meet([passed, *spread], x.shape) if spread else passed


@rule(nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm)
def local_response_norm(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """A statistic over neighbouring channels."""
    return ctx.statistic(labels_in((args, kwargs))[0], (1,))
