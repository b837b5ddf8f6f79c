"""Gates inside recurrent layers: on the columns that read units through the next step, and between the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree


class Columns(Protocol):
    """A gate that stands on activations, and can stand on the columns of a weight that reads them."""

    def __call__(self, x: Tensor, *, padded: bool = False) -> Tensor:
        """The gated activations; scoring samples them, and looks for moments where they are not `padded`."""

    def weigh(self, weight: Tensor) -> Tensor:
        """The weight with gated columns; nothing is sampled."""

    def watch(self, x: Tensor) -> None:
        """See activations, channels last: those that the weight reads, or packed ones."""


class PackedGate(nn.Module):
    """Puts a gate, made for padded sequences (samples, steps, channels), on packed ones."""

    def __init__(self, gate: Columns) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: PackedSequence) -> PackedSequence:
        return _gated_packed(self.gate, x)


def gated_module(module: nn.Module, gates: Mapping[str, Columns]) -> nn.Module:
    """A module that does what a recurrent layer does, with gates where its parameters of these names read units."""
    return GatedLayers(module, gates) if isinstance(module, nn.RNNBase) else GatedCell(module, gates)


class GatedCell(nn.Module):
    """A recurrent cell with a gate on the columns of its recurrent weight."""

    def __init__(self, module: nn.Module, gates: Mapping[str, Columns]) -> None:
        super().__init__()
        self.module, self.gates = module, dict(gates)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: gate.weigh(self.module.get_parameter(name)) for name, gate in self.gates.items()}
        states = torch.func.functional_call(self.module, weights, args, kwargs)
        for gate in self.gates.values():
            gate.watch(states[0] if isinstance(states, tuple) else states)
        return states


class GatedLayers(nn.Module):
    """A recurrent layer, run layer by layer by torch's own kernels.

    A gate called weight_ih_l1 stands on the input of that layer, for both directions; one called weight_hh_l0 or
    weight_hr_l0 on the columns of that weight. What a projection reads is sampled by its last state.
    """

    def __init__(self, module: nn.RNNBase, gates: Mapping[str, Columns]) -> None:
        super().__init__()
        self.module, self.gates = module, dict(gates)
        self.directions = 2 if module.bidirectional else 1
        self.names = [
            [name for part in module._all_weights[start : start + self.directions] for name in part]
            for start in range(0, module.num_layers * self.directions, self.directions)
        ]
        self.layers = [_single_layer(module, names) for names in self.names]

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        x, states = input, []
        for index, (layer, names) in enumerate(zip(self.layers, self.names, strict=True)):
            if gate := self.gates.get(f"weight_ih_l{index}"):
                x = _gated_sequence(gate, x, batch_first=self.module.batch_first)
            layer._flat_weights = [self._weight(name) for name in names]
            with torch.backends.cudnn.flags(enabled=False):  # whose backward pass runs in training mode only
                x, state = layer(x, self._rows(hx, index))
            self._sample_cells(names, state)
            self._show_steps(names, x)
            states.append(state)
        return x, pytree.tree_map(lambda *parts: torch.cat(parts), *states)

    def _rows(self, hx: Any, index: int) -> Any:
        """The initial states of one layer."""
        if isinstance(hx, tuple):
            return tuple(self._rows(state, index) for state in hx)
        return None if hx is None else hx[index * self.directions : (index + 1) * self.directions]

    def _weight(self, name: str) -> Tensor:
        weight = self.module.get_parameter(name)
        return self.gates[name].weigh(weight) if name in self.gates and "_ih_" not in name else weight

    def _show_steps(self, names: list[str], x: Any) -> None:
        """Show what a layer gives to the gates of the weights that read it a step later, of each direction its own."""
        recurrent = [name for name in names if name.startswith("weight_hh")]
        steps = x.data if isinstance(x, PackedSequence) else x
        for name, part in zip(recurrent, steps.chunk(self.directions, -1), strict=True):
            if name in self.gates:
                self.gates[name].watch(part)

    def _sample_cells(self, names: list[str], state: Any) -> None:
        projections = [name for name in names if name.startswith("weight_hr") and name in self.gates]
        for name, cells in zip(projections, state[1] if projections else (), strict=True):
            self.gates[name](cells.reshape(-1, cells.shape[-1]))


def _single_layer(module: nn.RNNBase, names: list[str]) -> Any:
    """A layer without weights of its own, which takes those that are put into it."""
    kind: Any = type(module)
    options: dict[str, Any] = {"proj_size": module.proj_size} if module.proj_size else {}
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    inputs = module.get_parameter(names[0]).shape[1]
    return kind(
        inputs, module.hidden_size, bias=module.bias, batch_first=module.batch_first,
        bidirectional=module.bidirectional, device="meta", **options,
    )  # fmt: skip


def _gated_sequence(gate: Columns, x: Any, *, batch_first: bool) -> Any:
    """Sequences of any layout through a gate made for (samples, steps, channels)."""
    if isinstance(x, PackedSequence):
        return _gated_packed(gate, x)
    if x.ndim == 2:
        return gate(x.unsqueeze(0)).squeeze(0)
    return gate(x) if batch_first else gate(x.transpose(0, 1)).transpose(0, 1)


def _gated_packed(gate: Columns, x: PackedSequence) -> PackedSequence:
    """Packed sequences through a gate: padded, gated, and packed again in the order that they had."""
    padded, lengths = pad_packed_sequence(x, batch_first=True)
    gate.watch(x.data)
    gated = gate(padded, padded=True)
    if x.sorted_indices is not None:
        gated, lengths = gated.index_select(0, x.sorted_indices), lengths[x.sorted_indices.cpu()]
    data, _ = torch._VF._pack_padded_sequence(gated, lengths, batch_first=True)
    return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
