"""The couplings of graphs that did not change since."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fxprune.coupling.groups import Coupling
from fxprune.rules.table import RULES
from fxprune.tracing.graph import ModelGraph

_KNOWN: WeakKeyDictionary[ModelGraph, _Known] = WeakKeyDictionary()
_STORES = {*vars(nn.Module()), "meta", "_flat_weights"}  # looked at in other ways; all else are options
_BY_VALUE = (type(None), bool, int, float, str, tuple, list, dict, set, torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What was found of a graph in one state, by options. What the state names by id is held: no other takes its id."""

    state: Hashable
    held: tuple[Any, ...]
    couplings: dict[Hashable, Coupling] = field(default_factory=dict)


def _as_it_stands(graph: ModelGraph) -> tuple[Hashable, tuple[Any, ...]]:
    """All that coupling looks at: the rules, nodes, options of modules, and tensors with how often each changed."""
    modules, names, tensors = [], [], []
    specs = tuple(node.meta.get("spec") for node in graph.graph.nodes)
    nodes = [(node.name, node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.graph.nodes]
    for path, module in graph.named_modules(remove_duplicate=False):
        options = {name: value for name, value in vars(module).items() if name not in _STORES}
        plain = str([(name, v if type(v) in _BY_VALUE else id(v)) for name, v in options.items()])
        modules.append((path, type(module) if path else None, plain))  # the graph's own class must go with it
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.append(f"{path}.{name}")
                tensors.append(tensor)
    ages = tuple((id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors)
    found = (tuple(RULES.items()), tuple(nodes), tuple(map(id, specs)), tuple(modules), tuple(names), ages)
    return found, (*specs, *tensors)
