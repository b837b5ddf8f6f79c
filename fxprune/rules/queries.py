"""Questions about a tensor (its size, dtype, device), and assertions: their values have no labels."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.movement import move
from fxprune.rules.table import rule, takes_index


@rule("size", torch.Tensor.size)
@takes_index
def size(ctx: Context, x: Labels, dim: int | None = None) -> Any:
    """The shape, or one size of it."""
    return torch.Size(x.shape) if dim is None else x.shape[dim]


@rule("dim", "ndimension", "__len__", "numel", "nelement", torch.numel, len)
@takes_index
def measure(ctx: Context, x: Any) -> int:
    """The rank, the length or the number of entries."""
    if not isinstance(x, Labels):
        return len(x)
    if ctx.node.target in ("dim", "ndimension"):
        return x.ndim
    return x.shape[0] if ctx.node.target in (len, "__len__") else torch.Size(x.shape).numel()


@rule(getattr)
@takes_index
def attribute(ctx: Context, x: Any, name: str) -> Any:
    """Shape, rank, dtype or device; a transpose (.T, .mT) is data movement, and .data is the tensor itself."""
    if isinstance(x, dict) and name in x and not hasattr(x, name):
        text = (
            f"a dict of a class of its own gives its entry {name!r} as an attribute, and torch looks into plain dicts"
        )
        raise TypeError(f"{text} only: read it as value[{name!r}], and give a plain dict, by unpack= say")
    if not isinstance(x, Labels):
        return getattr(x, name)
    if name in ("T", "mT", "H", "mH"):
        return move(ctx, x, name)
    if name in ("data", "real", "imag"):
        return x
    if name == "shape":
        return torch.Size(x.shape)
    if name == "ndim":
        return x.ndim
    if name in ("batch_sizes", "sorted_indices", "unsorted_indices"):  # of a packed sequence
        return pytree.tree_map_only(TensorSpec, lambda spec: Labels(spec.shape), ctx.spec())
    spec = ctx.spec(ctx.source(x))
    return getattr(torch.empty(0, dtype=spec.dtype, device=spec.device), name)


@rule("is_floating_point", "is_complex", "is_contiguous", "get_device", "element_size", torch.is_floating_point)
@takes_index
def property_of(ctx: Context, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """The answer in the original model."""
    return ctx.spec()


@rule("tolist")
def listed(ctx: Context, x: Labels) -> Any:
    """Python numbers of the channels, such as how many rows have chosen each expert."""
    return ctx.opaque(f"{ctx.describe()} makes a list of them", x)


@rule(torch._assert)
def check(ctx: Context, *args: Any, **kwargs: Any) -> None:
    """An assertion of the model, which has no value."""
