"""Recurrent steps, over the positions as a sequence, and cells, on the pooled channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from steps.kind import PLACES, SIZE, apply, back, drawn, kind, pooled, rows, spread

add = partial(kind, "recurrent")


def _sequence(layer: nn.Module, x: Tensor) -> Tensor:
    return back(layer(rows(x))[0])


def _state(layer: nn.Module, x: Tensor) -> Tensor:
    """The last state of the last layer, beside the outputs."""
    output, (hidden, _) = layer(rows(x))
    return back(output * hidden[-1].unsqueeze(1))


class Packed(nn.Module):
    """A recurrent layer that runs over a packed sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(rows(x), torch.full((x.size(0),), PLACES), batch_first=True)
        return back(pad_packed_sequence(self.inner(packed)[0], batch_first=True)[0])


def _step(layer: nn.Module, x: Tensor) -> Tensor:
    state: Any = layer(pooled(x))
    state = layer(pooled(x), state)
    return spread(state[0] if isinstance(layer, nn.LSTMCell) else state).expand(-1, -1, SIZE, SIZE)


def _function(cell: Any, x: Tensor, call: Any) -> Tensor:
    """One step by a function that is given the weights of a cell."""
    state = x.new_zeros(x.size(0), cell.hidden_size)
    given = (state, state) if call is torch.lstm_cell else state
    new = call(pooled(x), given, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return spread(new[0] if call is torch.lstm_cell else new).expand(-1, -1, SIZE, SIZE)


for _class in (nn.RNN, nn.LSTM, nn.GRU):
    _name = _class.__name__
    add(f"nn.{_name}", _sequence, partial(lambda c, i, o: c(i, o, batch_first=True), _class), width=drawn)
    add(
        f"two-way {_name}",
        _sequence,
        partial(lambda c, i, o: c(i, o // 2, batch_first=True, bidirectional=True), _class),
        width=drawn,
        alike=False,
    )
    _made = partial(lambda c, i, o: Packed(c(i, o, 2, batch_first=True)), _class)
    add(f"packed {_name}", apply, _made, width=drawn)
for _cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    add(f"nn.{_cell.__name__}", _step, lambda i, o, c=_cell: c(i, o), width=drawn)
for _cell, _name in (
    (nn.RNNCell, "rnn_tanh_cell"), (nn.RNNCell, "rnn_relu_cell"), (nn.LSTMCell, "lstm_cell"), (nn.GRUCell, "gru_cell"),
):  # fmt: skip
    _call = partial(_function, call=getattr(torch, _name))
    add(f"torch.{_name}", _call, lambda i, o, c=_cell: c(i, o), width=drawn, whole=True)
add("LSTM and its state", _state, lambda i, o: nn.LSTM(i, o, batch_first=True), width=drawn)
add("projected", _sequence, lambda i, o: nn.LSTM(i, o + 4, batch_first=True, proj_size=o), width=drawn)
