"""A network that computes the same with its units in another order."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from random_nets import RandomNet
from torch import Tensor

from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.tracing.graph import ModelGraph


def permuted(net: RandomNet, graph: ModelGraph, seed: int) -> tuple[RandomNet, NDArray[np.int64]]:
    """A copy of ``net`` in which, group by group, unit u stands where unit order[u] stood; and that order."""
    coupling = analyse(graph)
    order, other = _order(coupling, np.random.default_rng(seed)), copy.deepcopy(net)
    with torch.no_grad():
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            tensor.copy_(_moved(tensor, name, coupling, order))
    return other, order


def _order(coupling: Coupling, draw: np.random.Generator) -> NDArray[np.int64]:
    """A random order of the units of each group, among those that stand in the same tensors as often."""
    order = np.arange(coupling.units)
    slots = [coupling.unit_of[start : start + size] for start, size in coupling.slots.values()]
    counts = np.stack([np.bincount(units[units >= 0], minlength=coupling.units) for units in slots], 1)
    for group in coupling.prunable:
        own = np.array(group.units)
        _, kinds = np.unique(counts[own], axis=0, return_inverse=True)
        for kind in range(kinds.max() + 1):
            order[own[kinds == kind]] = draw.permutation(own[kinds == kind])
    return order


def _moved(tensor: Tensor, owner: str, coupling: Coupling, order: NDArray[np.int64]) -> Tensor:
    """The tensor with its slices along every axis of units in the new order."""
    moved = tensor.detach().clone()
    for slot, (start, size) in coupling.slots.items():
        if slot.owner == owner and isinstance(slot.axis, int):
            places = _places(coupling.unit_of[start : start + size], order)
            moved = torch.empty_like(moved).index_copy_(slot.axis, torch.from_numpy(places), moved)
    return moved


def _places(units: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each entry of an axis goes: the i-th of a unit to the place of the i-th of the unit that it becomes."""
    places = np.arange(len(units))
    for unit in np.unique(units[units >= 0]):
        places[units == unit] = np.flatnonzero(units == order[unit])
    return places
