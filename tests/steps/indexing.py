"""Steps that write, add or look up at places that are computed, or known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steps.kind import SIZE, Held, back, kind, rows

add = partial(kind, "indexing")


def _order(i: int, o: int) -> nn.Module:
    return Held(torch.randperm(SIZE))


def _any_order(i: int, o: int) -> nn.Module:
    return Held(torch.randperm(i))


def _places(x: Tensor) -> Tensor:
    """Of every sample (N, 36, 1): all places, backwards, as numbers that are computed from the image."""
    return torch.arange(SIZE * SIZE).flip(0)[None, :, None] + (0 * x.sum((1, 2, 3))).long()[:, None, None]


def _by_rows(call: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """A call on (N, 36, C) and its places."""
    return back(call(rows(x), _places(x)))


_WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scatter": lambda x, at: x.scatter(1, at.expand_as(x), 2 * x),
    "scatter_": lambda x, at: x.clone().scatter_(1, at.expand_as(x), 2 * x),
    "torch.scatter": lambda x, at: torch.scatter(x, 1, at.expand_as(x), 2 * x),
    "scatter_add": lambda x, at: x.scatter_add(1, at.expand_as(x), x),
    "scatter_add_": lambda x, at: torch.zeros_like(x).scatter_add_(1, at.expand(-1, -1, x.size(2)), x),
    "torch.scatter_add": lambda x, at: torch.scatter_add(x, 1, at.repeat(1, 1, x.shape[2]), x),
    "scatter_reduce": lambda x, at: x.scatter_reduce(1, at.expand_as(x), 2 * x, "amax"),
    "scatter_reduce_": lambda x, at: x.clone().scatter_reduce_(1, at.expand_as(x), x, "sum", include_self=False),
    "torch.scatter_reduce": lambda x, at: torch.scatter_reduce(x, 1, at.expand_as(x), x * 3, "mean"),
    "gather": lambda x, at: x.gather(1, at.expand_as(x)),
    "torch.gather": lambda x, at: torch.gather(x, 1, at.expand_as(x)),
    "take_along_dim": lambda x, at: x.take_along_dim(at, 1),
    "torch.take_along_dim": lambda x, at: torch.take_along_dim(x, at, dim=1),
    "index_put": lambda x, at: x.index_put((torch.arange(x.shape[0]), at[:, 1, 0]), x[:, 2]),
    "index_put_": lambda x, at: x.clone().index_put_((torch.arange(x.shape[0]), at[:, 1, 0]), x[:, 2], accumulate=True),
    "torch.index_put": lambda x, at: torch.index_put(x, (torch.arange(x.shape[0]), at[:, 1, 0]), x[:, 2]),
    "getitem by a mask": lambda x, at: x[at[..., 0] >= 0].view(x.shape),
    "getitem by computed numbers": lambda x, at: x[torch.arange(x.shape[0])[:, None], at[..., 0]],
}
_ORDERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_add": lambda x, at: x.index_add(1, at, x, alpha=2),
    "index_add_": lambda x, at: torch.zeros_like(x).index_add_(1, at, x),
    "torch.index_add": lambda x, at: torch.index_add(x, 1, at, x),
    "index_copy": lambda x, at: x.index_copy(1, at, 2 * x),
    "index_copy_": lambda x, at: x.clone().index_copy_(1, at, 2 * x),
    "torch.index_copy": lambda x, at: torch.index_copy(x, 1, at, 2 * x),
    "index_fill": lambda x, at: x.index_fill(1, at[:3], 0.5),
    "index_fill_": lambda x, at: x.clone().index_fill_(1, at[:3], 0.5),
    "torch.index_fill": lambda x, at: torch.index_fill(x, 1, at[:3], 0.5),
    "index_reduce": lambda x, at: x.index_reduce(1, at, x, "amax"),
    "index_reduce_": lambda x, at: x.clone().index_reduce_(1, at, x, "amin"),
    "torch.index_reduce": lambda x, at: torch.index_reduce(x, 1, at, x, "mean"),
    "index_select by computed numbers": lambda x, at: x.index_select(1, at),
}
for _title, _call in _WRITTEN.items():
    add(_title, lambda _, x, call=_call: _by_rows(call, x))
for _title, _call in _ORDERED.items():
    add(_title, lambda _, x, call=_call: _by_rows(lambda y, at: call(y, at[0, :, 0]), x))
add("index_select", lambda own, x: x.index_select(2, own.weight), _order)
add("torch.index_select", lambda own, x: torch.index_select(x, 3, own.weight), _order)
add("select by numbers", lambda own, x: x.index_select(1, own.weight), _any_order, alike=False)
add("gather at known places", lambda own, x: x.gather(3, own.weight.expand_as(x)), _order)
add("gather of channels", lambda _, x: x + x.gather(1, x.argmax(1, keepdim=True)), whole=True)


def _segments(x: Tensor) -> Tensor:
    lengths = torch.tensor([30, 6])
    return torch.segment_reduce(rows(x).transpose(0, 1).contiguous(), "mean", lengths=lengths, axis=0).sum(0)


add("torch.segment_reduce", lambda _, x: x + _segments(x)[:, :, None, None])
_COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "masked_scatter": lambda x: x.masked_scatter(x > 0, 2 * x),
    "masked_scatter_": lambda x: x.clone().masked_scatter_(x > 0, 2 * x),
    "torch.masked_scatter": lambda x: torch.masked_scatter(x, x > 0, 2 * x),
    "masked_select": lambda x: x * x.masked_select(x > 0).mean(),
    "torch.masked_select": lambda x: x * torch.masked_select(x, x > 0).mean(),
    "take": lambda x: x * x.take(torch.arange(3)).mean(),
    "torch.take": lambda x: x * torch.take(x, torch.arange(3)).mean(),
    "put_": lambda x: x.clone().put_(torch.arange(3), torch.ones(3, dtype=x.dtype)),
}
for _title, _counted in _COUNTED.items():
    add(_title, lambda _, x, call=_counted: call(x), whole=True, alike=False)
