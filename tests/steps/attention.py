"""Attention over the positions, in one piece and in parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import back, drawn, kind, rows

add = partial(kind, "attention")


def _fits(inputs: int) -> bool:
    return inputs % 4 == 0


class Projections(nn.Module):
    """Queries, keys, values and their way out; ``shared`` query heads read one head of keys."""

    def __init__(self, inputs: int, heads: int, size: int, outputs: int, shared: int = 1) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(inputs, heads * size), nn.Linear(heads * size, outputs)
        self.key, self.value = (nn.Linear(inputs, heads // shared * size) for _ in range(2))
        self.size = size

    def heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(rows(x)).unflatten(2, (-1, self.size)).transpose(1, 2)


def _attended(own: Any, x: Tensor, y: Tensor | None = None, **how: Any) -> Tensor:
    y = x if y is None else y
    q, k, v = own.heads(own.query, x), own.heads(own.key, y), own.heads(own.value, y)
    return back(own.out(F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2)))


def _by_hand(own: Any, x: Tensor) -> Tensor:
    q, k, v = own.heads(own.query, x), own.heads(own.key, x), own.heads(own.value, x)
    weights = (q @ k.transpose(-2, -1) / own.size**0.5).softmax(-1)
    return back(own.out((weights @ v).transpose(1, 2).flatten(2)))


def _by_einsum(own: Any, x: Tensor) -> Tensor:
    q, k, v = own.heads(own.query, x), own.heads(own.key, x), own.heads(own.value, x)
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return back(own.out(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)))


def _multihead(own: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
    y = x if y is None else y
    return back(own(rows(x), rows(y), rows(y))[0])


class Subclass(nn.MultiheadAttention):
    """A subclass that adds nothing."""


class Functional(nn.MultiheadAttention):
    """A subclass that calls the function itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.transpose(0, 1)
        own = (self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias)
        return F.multi_head_attention_forward(x, x, x, self.embed_dim, self.num_heads, *own)[0].transpose(0, 1)


add("attention", _attended, lambda i, o: Projections(i, 3, 4, o), width=drawn)
add("causal attention", partial(_attended, is_causal=True), lambda i, o: Projections(i, 2, 4, o), width=drawn)
add("shared keys", partial(_attended, enable_gqa=True), lambda i, o: Projections(i, 4, 2, o, 2), width=drawn)
add("one head of keys", partial(_attended, enable_gqa=True), lambda i, o: Projections(i, 4, 2, o, 4), width=drawn)
add("cross attention", _attended, lambda i, o: Projections(i, 3, 4, o), width=drawn, inputs=2)
add("attention by hand", _by_hand, lambda i, o: Projections(i, 3, 4, o), width=drawn)
add("attention by einsum", _by_einsum, lambda i, o: Projections(i, 3, 2, o), width=drawn)
add("nn.MultiheadAttention", _multihead, lambda i, o: nn.MultiheadAttention(i, 4, batch_first=True), needs=_fits)
add(
    "MultiheadAttention of two",
    _multihead,
    lambda i, o: nn.MultiheadAttention(i, 2, batch_first=True),
    needs=lambda i: i % 2 == 0,
    inputs=2,
)
add("subclass", _multihead, lambda i, o: Subclass(i, 4, batch_first=True), needs=_fits, whole=True)
add(
    "F.multi_head_attention_forward",
    lambda own, x: back(own(rows(x))),
    lambda i, o: Functional(i, 4),
    needs=_fits,
    whole=True,
)
