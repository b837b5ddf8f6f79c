"""Layers whose channels cannot leave exactly, or that are not opened: what they touch stays whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context
from fxprune.rules.table import rule


@rule(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
@rule(F.layer_norm, F.rms_norm, F.group_norm, F.local_response_norm, torch.layer_norm, torch.group_norm)
def statistics(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Normalised by a statistic that changes when channels leave."""
    return ctx.opaque(f"{_name(ctx)} takes a statistic over the channels", args, kwargs)


@rule(nn.MultiheadAttention, F.scaled_dot_product_attention, F.multi_head_attention_forward)
@rule(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer)
@rule(nn.TransformerDecoderLayer)
def attention(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Its channels are heads, and tied across queries, keys and values."""
    return ctx.opaque(f"{_name(ctx)} is attention, and kept whole", args, kwargs)


@rule(nn.Embedding, nn.EmbeddingBag, F.embedding, F.one_hot, nn.Fold, F.fold)
def lookup(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Its channels come from a table."""
    return ctx.opaque(f"{_name(ctx)} is kept whole", args, kwargs)


def _name(ctx: Context) -> str:
    if ctx.node.op == "call_module":
        return f"{type(ctx.module()).__name__} {ctx.node.target}"
    return ctx.describe()
