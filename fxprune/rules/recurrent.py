"""Recurrent layers: the hidden units of every layer and direction, which their own next step reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane, has_channels, labelled
from fxprune.rules.table import rule, takes_ragged


@rule(nn.RNN, nn.LSTM, nn.GRU)
@takes_ragged
def sequence(ctx: Context, module: Any, x: Labels, hx: Any = None) -> Any:
    """Read the last axis of a sequence; give the units of the last layer, and those of all layers as states."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    inputs = _last(ctx, x, read=True)
    rows: list[tuple[Tensor, Tensor]] = []
    for layer in range(module.num_layers):
        if layer:
            ctx.recur(f"weight_ih_l{layer}", inputs)
        found = [_units(ctx, inputs, f"_l{layer}{direction}") for direction in directions]
        inputs = torch.cat([hidden for hidden, _ in found])
        rows += found
    _balance(ctx, module)
    states = tuple(list(state) for state in zip(*rows, strict=True))
    _start(ctx, hx, states)
    output, last = ctx.spec()
    specs = last if isinstance(last, tuple) else (last,)
    values = tuple(_state(state, spec.shape) for state, spec in zip(states, specs, strict=False))
    return _along(inputs, output.shape), values if isinstance(last, tuple) else values[0]


@rule(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def cell(ctx: Context, module: Any, x: Labels, hx: Any = None) -> Any:
    """One step: read the last axis of the input, and the units of the step before."""
    hidden, _ = _units(ctx, _last(ctx, x, read=True), "")
    _start(ctx, hx, ([hidden], [hidden]))
    return pytree.tree_map(lambda spec: _along(hidden, spec.shape), ctx.spec())


@rule(torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.lstm_cell, torch.gru_cell)
def step(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """One step of a cell by a function of its weights: all channels are kept, because no module names its units."""
    return ctx.opaque(f"is read by {ctx.describe()}, which no module stands for", labels_in((args, kwargs)))


@rule(pack_padded_sequence)
def pack(ctx: Context, input: Labels, lengths: Any, *args: Any, **kwargs: Any) -> Labels:  # noqa: A002 - torch's name
    """The steps of all sequences in one axis; the channels pass."""
    return _along(_last(ctx, input), ctx.spec().shape)


@rule(pad_packed_sequence)
def pad(ctx: Context, sequence: Labels, *args: Any, **kwargs: Any) -> tuple[Labels, Labels]:
    """The padded sequences, and their lengths."""
    padded, lengths = ctx.spec()
    return _along(_last(ctx, sequence), padded.shape), Labels(lengths.shape)


def is_zero(hx: Any) -> bool:
    """Whether initial states are known to be zeros, a layer's default."""
    states = labels_in(hx)
    return bool(states) and all(x.value is not None and not bool(x.value.any()) for x in states)


def _units(ctx: Context, inputs: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    """Tie the parameters of one layer and direction; gives its hidden units, projected or not, and its cells."""
    weights = [ctx.own(f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    read, recurrent, *_ = weights
    projection = ctx.own(f"weight_hr{suffix}")
    if read is None or recurrent is None:
        raise TypeError(f"{ctx.site()} keeps no weight_ih{suffix} and weight_hh{suffix} of its own")
    ctx.tie(inputs, ctx.vector(read, 1))
    hidden = cells = ctx.vector(recurrent, 1)
    ctx.recur(f"weight_hh{suffix}", hidden)
    site = f"{ctx.site()}{suffix.replace('_', '.', 1)}"
    if projection is not None:
        cells = ctx.vector(projection, 1)
        ctx.tie(hidden, ctx.vector(projection, 0))
        ctx.recur(f"weight_hr{suffix}", cells)
        ctx.produce(hidden, f"{site}.projection")
    for weight in weights:
        if weight is not None:
            ctx.tie(ctx.vector(weight, 0).reshape(-1, len(cells)), cells)
    ctx.produce(cells, site)
    return hidden, cells


def _balance(ctx: Context, module: Any) -> None:
    """A module has one hidden_size and one smaller proj_size for all its layers and directions."""
    weights = [name for name in module._flat_weights_names if name.startswith("weight_ih_")]
    sites = [f"{ctx.site()}.{name.removeprefix('weight_ih_')}" for name in weights]
    ctx.balance(*sites)
    if ctx.own("weight_hr_l0") is not None:
        ctx.balance(*(f"{site}.projection" for site in sites))
        ctx.outnumber(sites[0], f"{sites[0]}.projection")


def _start(ctx: Context, hx: Any, states: tuple[list[Tensor], ...]) -> None:
    """Tie the initial states (one, or the hidden and the cell state) to the units that they initialise."""
    zero = is_zero(hx)
    for given, rows in zip(labels_in(hx), states, strict=False):
        last = given.ndim - 1
        if zero and given.shape[last] != len(rows[0]):
            raise ValueError(f"the initial state has {given.shape[last]} zeros in place of {len(rows[0])}")
        if zero:
            continue
        _freeze_beside(ctx, given, last)
        planes = given.along(last)
        if len(planes) == 1 and planes[0].axes == (0, last) and len(rows) > 1:
            vectors = list(planes[0].core.reshape(len(rows), -1))
        else:
            vectors = [ctx.vector(given, last)] * len(rows)
        for vector, labels in zip(vectors, rows, strict=True):
            if not has_channels(vector):
                ctx.freeze(labels, f"the initial state of {ctx.site()} is given")
            ctx.tie(vector, labels)


def _state(rows: list[Tensor], shape: tuple[int, ...]) -> Labels:
    """The states of all layers and directions: each row has units of its own, all the same number."""
    if len(rows) == 1 or not has_channels(torch.stack(rows)):
        return _along(rows[0], shape)
    core = torch.stack(rows).reshape(len(rows), *[1] * (len(shape) - 2), -1)
    return Labels((*shape[:-1], len(rows[0])), (Plane(core, (0, len(shape) - 1), ragged=True),))


def _last(ctx: Context, x: Labels, *, read: bool = False) -> Tensor:
    """The labels along the last axis, which the layer may read."""
    _freeze_beside(ctx, x, x.ndim - 1)
    return ctx.consume(x, x.ndim - 1) if read else ctx.vector(x, x.ndim - 1)


def _freeze_beside(ctx: Context, x: Labels, dim: int) -> None:
    for plane in x.beside(dim):
        ctx.freeze(plane.core, f"lies along the steps or the samples that {ctx.describe()} runs over")


def _along(vector: Tensor, shape: tuple[int, ...]) -> Labels:
    """A value of the given shape whose last axis carries the labels `vector`."""
    return Labels((*shape[:-1], len(vector)), labelled(vector, len(shape) - 1, len(shape)))
