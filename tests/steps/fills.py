"""Steps that begin with a new tensor of one number, of a size that is read from the image or written down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from steps.kind import SIZE, kind

add = partial(kind, "fills")

_MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.zeros": lambda x: torch.zeros(x.shape[0], x.shape[1], SIZE, SIZE, dtype=x.dtype),
    "torch.zeros of a shape": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    "torch.ones": lambda x: torch.ones((1, x.size(1), 1, 1), dtype=x.dtype),
    "torch.empty": lambda x: torch.empty(x.size(0), x.size(1), 1, 1, dtype=x.dtype).fill_(0.5),
    "torch.full": lambda x: torch.full((x.shape[0], x.shape[1], 1, 1), 0.5, dtype=x.dtype),
    "torch.full of a size": lambda x: torch.full((x.shape[1], 1, 1), 1 / x.shape[1], dtype=x.dtype),
    "torch.zeros_like": torch.zeros_like,
    "torch.ones_like": torch.ones_like,
    "torch.empty_like": lambda x: torch.empty_like(x).zero_(),
    "torch.full_like": lambda x: torch.full_like(x, 0.5),
    "new_zeros": lambda x: x.new_zeros(x.shape),
    "new_ones": lambda x: x.new_ones(x.size()),
    "new_empty": lambda x: x.new_empty(x.shape).zero_(),
    "new_full": lambda x: x.new_full(x.shape, 0.5),
    "new_full of a size": lambda x: x.new_full((x.shape[1], 1, 1), fill_value=1 / x.shape[1]),
}
for _title, _make in _MADE.items():
    add(_title, lambda _, x, make=_make: x + make(x))
add("new_zeros beside it", lambda _, x: torch.cat([x, x.new_zeros(x.shape[0], x.shape[1], 1, SIZE)], 2)[:, :, :SIZE])
add("a state in a loop", lambda _, x: _running(x, x.new_zeros(x.shape[0], x.shape[1], SIZE)))


def _running(x: Tensor, state: Tensor) -> Tensor:
    for row in range(SIZE):
        state = state * 0.5 + x[:, :, row]
    return x + state[:, :, None]
