"""Tables that are looked up by number: their width is a layer's channels, their rows stay. Patches of images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import NO_CHANNEL, Labels, vector_plane
from fxprune.rules.table import rule


@rule(nn.Embedding)
def embedding_module(ctx: Context, module: nn.Embedding, indices: Labels) -> Any:
    """The table of the module."""
    return _looked_up(ctx, ctx.own("weight"), norm=module.max_norm)


@rule(F.embedding)
def embedding(
    ctx: Context,
    input: Any,  # noqa: A002 - torch's name
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    *args: Any,
    **named: Any,
) -> Any:
    """Rows of the table, by number; what else there is to say has to do with gradients."""
    return _looked_up(ctx, weight, norm=max_norm)


@rule(nn.EmbeddingBag)
def bag_module(ctx: Context, module: nn.EmbeddingBag, *inputs: Any) -> Any:
    """The table of the module; rows of a bag are added up, each place in them by itself."""
    return _looked_up(ctx, ctx.own("weight"), norm=module.max_norm)


def _looked_up(ctx: Context, weight: Any, *, norm: float | None) -> Labels:
    """The last axis carries the channels of the table."""
    shape, ndim = ctx.spec().shape, len(ctx.spec().shape)
    ctx.freeze(ctx.vector(weight, 0), "rows of a table are looked up by number")
    width = ctx.vector(weight, 1)
    if norm is not None:
        ctx.freeze(width, f"{ctx.describe()} bounds the norm of what it looks up")
    ctx.produce(width, ctx.site(weight))
    plane = (vector_plane(width, ndim - 1, ndim),) if bool((width != NO_CHANNEL).any()) else ()
    return Labels((*shape[:-1], len(width)), plane)


@rule(F.one_hot, nn.Fold, F.fold)
def lookup(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Its channels are numbers that came in, or patches that overlap."""
    return ctx.opaque(f"{ctx.describe()} is kept whole", args, kwargs)


@rule(F.unfold, nn.Unfold)
def unfold(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """im2col: every channel becomes kernel-size many rows."""
    x = labels_in((args, kwargs))[0]
    spec = ctx.spec()
    source = ctx.source(x)
    rows = spec.shape[1] // ctx.spec(source).shape[1] if source else 1
    vector = ctx.vector(x, 1).repeat_interleave(rows)
    return Labels((x.shape[0], len(vector), *spec.shape[2:]), (vector_plane(vector, 1, 3),))
