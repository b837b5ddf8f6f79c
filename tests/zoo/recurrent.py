"""Recurrent layers: their hidden units are read by the next layers and by their own next step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nets import layers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.case import CLASSES, add, case, conv, images, tensors

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": 6}),
    "gru": (nn.GRU, {}),
}


class Classifier(nn.Module):
    """A layer that feeds a recurrent one, and a head that reads its last step, or its mean over the steps."""

    def __init__(self, kind: type[nn.RNNBase], *, mean: bool = False, **options: Any) -> None:
        super().__init__()
        self.a, self.rnn, self.mean = nn.Linear(7, 8), kind(8, 10, **options), mean
        width = (self.rnn.proj_size or 10) * (1 + self.rnn.bidirectional)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y, _ = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        if self.mean:
            return self.head(y.mean(1 if self.rnn.batch_first else 0))
        return self.head(y[:, -1] if self.rnn.batch_first else y[-1])


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"batch_first": True},
    "both_ways": {"bidirectional": True, "batch_first": True, "mean": True, "bias": False},
    "time_major": {"mean": True},
    "deep": {"num_layers": 3, "dropout": 0.2, "batch_first": True},
    "deep_both_ways": {"num_layers": 2, "bidirectional": True},
}

ALONE = (("rnn_tanh", "one"), ("rnn_tanh", "both_ways"), ("gru", "time_major"), ("gru", "deep"))
for _kind, (_class, _extra) in KINDS.items():
    for _layout, _options in LAYOUTS.items():
        if _kind.startswith("lstm") or _layout == "deep_both_ways" or (_kind, _layout) in ALONE:
            add(
                f"{_kind}_{_layout}",
                lambda kind=_class, options=_extra | _options: Classifier(kind, **options),
                tensors(5, 7),
                shrinks=("a", "rnn"),
                frozen=("head",),
            )


class States(nn.Module):
    """The classifier reads the last states in place of the outputs."""

    def __init__(self, kind: type[nn.RNNBase], pick: str, **options: Any) -> None:
        super().__init__()
        self.rnn, self.pick = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True, **options), pick
        width = {"last": 8, "both": 16, "all": 32, "view": 16, "mean": 8, "each": 8, "cells": 16}[pick]
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        h, c = (state, None) if isinstance(self.rnn, nn.GRU) else (state[0], state[1])
        if self.pick == "both":
            return self.head(torch.cat([h[-2], h[-1]], 1))
        if self.pick == "all":
            return self.head(h.permute(1, 0, 2).reshape(h.shape[1], -1))
        if self.pick == "view":
            last = h.view(2, 2, -1, h.shape[-1])[-1]
            return self.head(torch.cat([last[0], last[1]], -1))
        if self.pick == "mean":
            return self.head(h.mean(0))
        if self.pick == "each":
            return self.head(h.relu()).sum(0)
        return self.head(torch.cat((c[0], h[3]), dim=-1) if self.pick == "cells" else h[-1])


for _pick in ("last", "both", "all", "view", "mean", "each", "cells"):
    for _kind, _class in {"lstm": nn.LSTM, "gru": nn.GRU}.items():
        if _kind == "lstm" or _pick == "last":
            add(
                f"{_kind}_{_pick}_states",
                lambda kind=_class, pick=_pick: States(kind, pick),
                tensors(5, 6),
                shrinks=("rnn",),
                frozen=("head",),
            )


@case(images(size=4), shrinks=("a", "b", "lstm", "gru", "after"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 6), lstm=nn.LSTM(6, 10, batch_first=True, bidirectional=True), gru=nn.GRU(20, 8),
    after=nn.Linear(8, 12), head=nn.Linear(12, CLASSES),
))  # fmt: skip
def RecurrentInside(self, x: Tensor) -> Tensor:
    """A part of one state is added to another layer's outputs."""
    x = self.b(self.a(x).relu()).flatten(2).transpose(1, 2)
    x, (last, _) = self.lstm(x)
    x, _ = self.gru(x.transpose(0, 1))
    return self.head(self.after(x[-1] + last[0, :, :8]).relu())


@case(tensors(5, 6), shrinks=("a",), frozen=("rnn", "head"))
@layers(lambda: dict(a=nn.Linear(6, 8), rnn=nn.GRU(8, 8, 2, batch_first=True), head=nn.Linear(8, CLASSES)))
def StatesAsOutputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
    y, h = self.rnn(self.a(x).relu())
    return self.head(y), h[0]


def sequences(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Sequences of six steps at the most, and their lengths, not sorted."""
    lengths = torch.tensor([4, 6, 1, 3, 6, 2, 5, 6])[torch.arange(batch) % 8]
    return tensors(6, 7)(batch), lengths


class Packed(nn.Module):
    """Sequences of several lengths, through two packed layers."""

    def __init__(self, kind: type[nn.RNNBase], *, batch_first: bool, read: str) -> None:
        super().__init__()
        self.a, self.first = nn.Linear(7, 8), kind(8, 9, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.second, self.head = nn.GRU(18, 10), nn.Linear(10, CLASSES)
        self.batch_first, self.read = batch_first, read

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x if self.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
        packed, _ = self.first(packed)
        packed, state = self.second(packed)
        if self.read == "states":
            return self.head(state[-1])
        y, _ = nn.utils.rnn.pad_packed_sequence(packed, padding_value=1.0, total_length=6)
        return self.head(y).sum(0)


for _read, _batch_first, _kind in (
    ("states", True, "lstm"), ("states", False, "gru"), ("outputs", True, "lstm"), ("outputs", True, "gru")
):  # fmt: skip
    add(
        f"packed_{_kind}_{_read}_{'samples' if _batch_first else 'steps'}_first",
        partial(Packed, getattr(nn, _kind.upper()), batch_first=_batch_first, read=_read),
        sequences,
        shrinks=("a", "first", "second"),
        frozen=("head",),
    )


@case(sequences, shrinks=("a", "rnn"))
@layers(lambda: dict(a=nn.Linear(7, 8), rnn=nn.RNN(8, 9, batch_first=True), head=nn.Linear(9, CLASSES)))
def PackedThere(self, x: Tensor, lengths: Tensor) -> Tensor:
    """Packed and padded again, without a layer between."""
    packed = pack_padded_sequence(self.a(x).relu(), lengths, batch_first=True, enforce_sorted=False)
    x, _ = pad_packed_sequence(packed, batch_first=True, total_length=6)
    return self.head(self.rnn(x)[0].mean(1))


@case(sequences, shrinks=("a", "rnn"))
@layers(lambda: dict(a=nn.Linear(7, 8), rnn=nn.LSTM(8, 9, batch_first=True), head=nn.Linear(9, CLASSES)))
def LastSteps(self, x: Tensor, lengths: Tensor) -> Tensor:
    """The last step of each sequence is picked by an index that is computed from the lengths."""
    x, _ = self.rnn(self.a(x).relu())
    return self.head(x[torch.arange(x.shape[0]), lengths - 1])


@case(images(1, 8), shrinks=("a", "first", "between", "second"))
@layers(lambda: dict(
    a=conv(1, 6), first=nn.LSTM(48, 9, bidirectional=True), between=nn.Linear(18, 8),
    second=nn.LSTM(8, 7, bidirectional=True), head=nn.Linear(14, CLASSES),
))  # fmt: skip
def ColumnsOfAnImage(self, x: Tensor) -> Tensor:
    """As in text recognition: maps are cut into columns, which two layers read in both directions, time first."""
    x = self.a(x).relu().permute(3, 0, 1, 2).flatten(2)
    x = self.between(self.first(x)[0])
    return self.head(self.second(input=x)[0]).mean(0)


class Loop(nn.Module):
    """A cell, called once a step; its states start at zero, or at a parameter."""

    def __init__(self, kind: type[nn.RNNCellBase], start: str) -> None:
        super().__init__()
        self.a, self.cell, self.head, self.start = nn.Linear(6, 8), kind(8, 10), nn.Linear(10, CLASSES), start
        self.h0 = nn.Parameter(torch.randn(1, 10)) if start == "parameter" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        states = []
        state = None if self.start == "none" else self.first(x)
        if isinstance(self.cell, nn.LSTMCell) and state is not None:
            state = (state, state)
        for step in range(4):
            state = self.cell(x[:, step], state)
            states.append(state[0] if isinstance(self.cell, nn.LSTMCell) else state)
        return self.head(states[-1] + torch.stack(states, 1).mean(1))

    def first(self, x: Tensor) -> Tensor:
        if self.h0 is not None:
            return self.h0.expand(x.shape[0], -1)
        return x.new_zeros(x.shape[0], 10) if self.start == "new" else torch.zeros(x.shape[0], 10).to(x)


for _start in ("none", "zeros", "new", "parameter"):
    for _kind, _cell in {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}.items():
        if (_start, _kind) in (("none", "rnn"), ("parameter", "gru")) or _kind == "lstm":
            add(
                f"{_kind}_cell_from_{_start}",
                lambda cell=_cell, start=_start: Loop(cell, start),
                tensors(4, 6),
                shrinks=("a", "cell"),
                frozen=("head",),
            )


class Started(nn.Module):
    """Initial states: zeros of the graph, learned ones, or ones computed by a layer."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 10, num_layers=2, batch_first=True), nn.Linear(10, CLASSES)
        self.start, self.init = start, nn.Linear(6, 10) if start == "layer" else None
        self.h0 = nn.Parameter(torch.randn(2, 1, 10)) if start == "parameter" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.init is not None:
            h = c = self.init(x[:, 0]).tanh().unsqueeze(0).repeat(2, 1, 1)
        elif self.h0 is not None:
            h, c = self.h0.expand(-1, x.shape[0], -1), self.h0.tanh().repeat(1, x.shape[0], 1)
        else:
            h, c = torch.zeros(2, x.size(0), 10, dtype=x.dtype), x.new_zeros(2, x.size(0), 10)
        y, _ = self.rnn(x, (h, c))
        return self.head(y[:, -1])


for _start in ("zeros", "parameter", "layer"):
    add(f"lstm_from_{_start}", lambda start=_start: Started(start), tensors(5, 6), shrinks=("rnn",))


@case(lambda batch=2: (tensors(5, 6)(batch), tensors(10)(batch)), shrinks=("a", "after"), frozen=("rnn",))
@layers(lambda: dict(
    a=nn.Linear(6, 8), rnn=nn.GRU(8, 10, batch_first=True), after=nn.Linear(10, 9), head=nn.Linear(9, CLASSES),
))  # fmt: skip
def StateGiven(self, x: Tensor, h: Tensor) -> Tensor:
    """An input of the model is the initial state: its width stays."""
    y, _ = self.rnn(self.a(x).relu(), h.unsqueeze(0))
    return self.head(self.after(y[:, -1]).relu())


@case(lambda batch=2: (tensors(5, 6)(batch), tensors(4, 6)(batch)), shrinks=("encoder", "decoder"))
@layers(lambda: dict(
    encoder=nn.LSTM(6, 10, 2, batch_first=True), decoder=nn.LSTM(6, 10, 2, batch_first=True),
    head=nn.Linear(10, CLASSES),
))  # fmt: skip
def EncoderDecoder(self, x: Tensor, y: Tensor) -> Tensor:
    """The decoder starts with the encoder's last states, row by row."""
    _, state = self.encoder(x)
    y, _ = self.decoder(y, state)
    return self.head(y[:, -1])


@case(tensors(5, 6), shrinks=("rnn", "after"))
@layers(lambda: dict(rnn=nn.GRU(6, 6, 2, batch_first=True), after=nn.Linear(6, 8), head=nn.Linear(8, CLASSES)))
def SharedRecurrent(self, x: Tensor) -> Tensor:
    """One module is called twice."""
    y, h = self.rnn(x)
    y, _ = self.rnn(x.flip(1), h)
    return self.head(self.after(y).relu().mean(1))


@case(tensors(5, 6), shrinks=("rnn",))
@layers(lambda: dict(rnn=nn.LSTM(6, 10, batch_first=True, bidirectional=True), head=nn.Linear(10, CLASSES)))
def DirectionsSummed(self, x: Tensor) -> Tensor:
    """The halves of a bidirectional output are added: units of the two directions go in pairs."""
    y, _ = self.rnn(x)
    return self.head((y[..., :10] + y[..., 10:]).mean(1) + y.view(x.shape[0], -1, 2, 10).sum(2).amax(1))
