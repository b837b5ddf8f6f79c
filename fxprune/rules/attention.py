"""Attention: heads are the rows of a grid, and the places in a head its columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context
from fxprune.rules.contractions import contract, product
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import rule

_BATCH = "abcdefgh"  # names for the axes before lengths and places


@rule(F.scaled_dot_product_attention)
def dot_product(
    ctx: Context, query: Labels, key: Labels, value: Labels, attn_mask: Labels | None = None, *args: Any,
    enable_gqa: bool = False, **kwargs: Any,
) -> Labels:  # fmt: skip
    """Softmax(q k^T) v: a head is removed from all three, or a place of every head from two of them."""
    if enable_gqa and ctx.remember("keys", key.shape[-3]) > 1:  # a single head of keys is broadcast
        key, value = (_repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    batch = _BATCH[: max(query.ndim, key.ndim) - 2]
    terms = [batch[len(batch) - x.ndim + 2 :] + names for x, names in ((query, "LE"), (key, "SE"))]
    scores = contract(ctx, terms, (query, key), f"{batch}LS", tag="scores")
    if attn_mask is not None:
        scores = ctx.meet((scores, attn_mask), torch.broadcast_shapes(scores.shape, attn_mask.shape))
    for plane in scores.along(scores.ndim - 1):
        ctx.freeze(plane.core, f"{ctx.describe()} takes a statistic over the channels")
    weights = Labels(scores.shape, scores.beside(scores.ndim - 1))
    return product(ctx, weights, value, tag="attended", constant=[False, ctx.is_constant(value)])


def _repeated(x: Labels, times: int) -> Labels:
    """Keys or values with every head repeated for the queries that share it."""
    heads = x.ndim - 3
    shape = (*x.shape[:heads], x.shape[heads] * times, *x.shape[heads + 1 :])
    planes = (Plane(p.core.repeat_interleave(times, heads) if heads in p.axes else p.core, p.axes) for p in x.planes)
    return Labels(shape, tuple(plane for plane in planes if plane.core.numel()))


@rule(nn.MultiheadAttention, F.multi_head_attention_forward)
def unopened(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Attention in one piece, such as a subclass with a forward of its own: kept whole."""
    return ctx.opaque(f"{ctx.describe()} is attention in one piece, and kept whole", args, kwargs)
