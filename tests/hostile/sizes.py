"""Sizes of the batch in a forward: whatever the example had, the graph runs at other batch sizes and gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, hostile, masked, middle, middles, sequences

KIND = "sizes"


def _windows(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    windows = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    windows = windows - windows.mean(1, keepdim=True)
    return windows.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def _padded_batch(x: Tensor) -> Tensor:
    rest = -x.shape[0] % 4
    return torch.cat([x, x.new_zeros(rest, *x.shape[1:])])[: x.shape[0]] * 2


def _ghosts(x: Tensor) -> Tensor:
    return torch.cat([part - part.mean((0, 2, 3), keepdim=True) for part in x.split(2)])


def _minibatch_std(x: Tensor) -> Tensor:
    return x * (1 + x.std(0, unbiased=False).mean()).view(1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape_of_a_size_made_anew": lambda x: x.flatten(1).reshape(torch.Size((x.size(0), x.size(1), 8, 8))) * 2,
    "unflatten_of_the_rest": lambda x: x.flatten(0, 1).tanh().unflatten(0, (-1, 8)),
    "windows": _windows,
    "strides": lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()) * 2,
}
BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided_by_the_length": lambda x: x + x.sum(0, keepdim=True) / len(x),
    "halves": lambda x: torch.cat([x[: x.shape[0] // 2] * 2, x[x.shape[0] // 2 :]]),
    "a_parity": lambda x: x * (1 + x.shape[0] % 2),
    "repeat": lambda x: x + x[:1].repeat(x.size(0), 1, 1, 1),
    "arange_backwards": lambda x: x + x[torch.arange(len(x) - 1, -1, -1)],
    "picked_by_argmax": lambda x: (
        x * x[torch.arange(x.shape[0]), 0, x.mean((1, 3)).argmax(1)].mean(1).view(-1, 1, 1, 1)
    ),
    "padded_to_a_multiple": _padded_batch,
    "minibatch_standard_deviation": _minibatch_std,
    "similarity_of_samples": lambda x: torch.einsum("ab,bchw->achw", (x.flatten(1) @ x.flatten(1).T).softmax(1), x),
    "scatter_by_sample": lambda x: torch.zeros_like(x).index_add_(0, torch.arange(len(x)).flip(0), x) + x,
}
BY_PYTHON: dict[str, Callable[[Tensor], Tensor]] = {  # what no graph says of every batch size
    "divided_by_a_float": lambda x: x + x.sum(0, keepdim=True) / float(x.shape[0]),
    "a_maximum": lambda x: x * max(1, x.shape[0] // 2),
    "numpy_arange": lambda x: x * torch.from_numpy(np.arange(1, x.shape[0] + 1)).view(-1, 1, 1, 1),
    "iterated_with_numbers": lambda x: torch.stack([row * (i + 1) for i, row in enumerate(x)]),
    "split_by_two": _ghosts,
    "branch_on_parity": lambda x: x * 2 if x.shape[0] % 2 == 0 else x,
    "branch_on_length": lambda x: x * 2 if len(x) > 4 else x,
    "loop_over_the_batch": lambda x: _repeated(x),
    "layer_of_the_batch": lambda x: (torch.tanh, torch.sigmoid, torch.relu)[x.shape[0] % 3](x),
}


def _repeated(x: Tensor) -> Tensor:
    for _ in range(x.shape[0]):
        x = x + 0.5
    return x


middles(KIND, SHAPES, may=["strides", "reshape_of_a_size_made_anew"])
middles(KIND, BATCHES, may=["scatter_by_sample"])
middles(KIND, BY_PYTHON, wanted="any")


@middle(KIND, layers=lambda: {"readout": nn.Linear(16, 8)})
def readout_of_a_token(self: Any, x: Tensor) -> Tensor:
    """As in dense prediction transformers: a token is put beside every other."""
    tokens = x.flatten(2).transpose(1, 2)
    readout = tokens[:, :1].expand_as(tokens)
    return self.readout(torch.cat((tokens, readout), -1)).permute(0, 2, 1).reshape(x.shape)


OF_ANOTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shape_of_another_input": lambda h, mask: h.reshape(*mask.shape, -1) * mask.unsqueeze(-1),
    "length_of_another_input": lambda h, mask: h.reshape(len(mask) * 5, 16).view(len(mask), 5, 16) * mask[..., None],
    "index_of_another_input": lambda h, mask: h[torch.arange(mask.shape[0]), mask.argmax(1)][:, None] + h,
}


def _steps(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Steps(lambda _, h, mask: function(h, mask))


for _name, _function in OF_ANOTHER.items():
    add(KIND, _name, _steps(_function), masked)


@hostile(KIND, sequences)
def steps_in_a_loop() -> nn.Module:
    def middle(self: Any, h: Tensor, mask: Any) -> Tensor:
        state, given = h.new_zeros(h.shape[0], 16), []
        for step in range(h.size(1)):
            state = self.g(h[:, step], state)
            given.append(state)
        return torch.stack(given, 1)

    return Steps(middle, g=nn.GRUCell(16, 16))


@hostile(KIND)
class PairsOfTheBatch(Net):
    """The head gives as many rows as there are samples, by way of all pairs."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c2(self.c1(x))).mean((2, 3))
        left, right = h[:, None].expand(-1, len(h), -1), h[None].expand(len(h), -1, -1)
        return self.f((left * right).reshape(len(h) ** 2, -1)).reshape(len(h), len(h), -1).mean(1)
