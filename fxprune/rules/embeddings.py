"""Tables whose rows are looked up by number: their columns are the channels of a layer. Patches of images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, labelled, vector_plane
from fxprune.rules.table import rule


@rule(nn.Embedding, nn.EmbeddingBag)
def embedding_module(ctx: Context, module: Any, *inputs: Any) -> Any:
    """The table of the module; the rows of a bag are added up, each column by itself."""
    return _looked_up(ctx, ctx.own("weight"), norm=module.max_norm)


@rule(F.embedding)
def embedding(ctx: Context, indices: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of the table, by number."""
    return _looked_up(ctx, weight, norm=ctx.call.get("max_norm"))


def _looked_up(ctx: Context, weight: Any, *, norm: float | None) -> Labels:
    """The last axis carries the channels of the table."""
    shape = ctx.spec().shape
    ctx.freeze(ctx.vector(weight, 0), "rows of a table are looked up by number")
    width = ctx.vector(weight, 1)
    if norm is not None:
        ctx.freeze(width, f"{ctx.describe()} bounds the norm of what it looks up")
    ctx.produce(width, ctx.site(weight))
    return Labels((*shape[:-1], len(width)), labelled(width, len(shape) - 1, len(shape)))


@rule(nn.Fold, F.fold)
def lookup(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """The output's channels are overlapping patches."""
    return ctx.opaque(f"{ctx.describe()} is kept whole", args, kwargs)


@rule(F.unfold, nn.Unfold)
def unfold(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """im2col: every channel becomes kernel-size many rows."""
    x, shape = labels_in((args, kwargs))[0], ctx.spec().shape
    source = ctx.source(x)
    rows = shape[1] // ctx.spec(source).shape[1] if source else 1
    vector = ctx.vector(x, 1).repeat_interleave(rows)
    return Labels((x.shape[0], len(vector), *shape[2:]), (vector_plane(vector, 1, 3),))
