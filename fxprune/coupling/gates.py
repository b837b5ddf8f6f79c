"""Gates: nodes on the edges where channels are read, for scoring and as the oracle that proves a removal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor, fx, nn

from fxprune.caller.example import PackedSpec
from fxprune.coupling.expert_gates import RoutedGate
from fxprune.coupling.groups import Coupling, Edge, key_of_edge
from fxprune.coupling.left_out import changes_of, roots_of
from fxprune.coupling.recurrent_gates import PackedGate, gated_module
from fxprune.tracing.graph import ModelGraph, OwnSource


class Gate(nn.Module, ABC):
    """A node on one edge; `units[i]` is the unit of position i along axis `dim`, or -1."""

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        self.dim, self.units, self.reads = edge.dim, edge.units, f"{edge.source} -> {edge.consumer}"
        self.key, self.compared = key_of_edge(edge), edge.compared

    @abstractmethod
    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        """Observe or change `x`; where it is `padded`, `watch` is called with the values without the padding."""

    @abstractmethod
    def weigh(self, weight: Tensor) -> Tensor:
        """Change the columns of a weight that reads the units in the same way; nothing is sampled."""

    def watch(self, x: Tensor) -> None:
        """Observe activations, channels last: the inputs of the weight that `weigh` is given, or packed ones."""


def insert(
    graph: ModelGraph, coupling: Coupling, make: Callable[[Edge], Gate], *, compared: bool = True,
    branches: bool = False,
) -> tuple[fx.GraphModule, list[Gate]]:  # fmt: skip
    """A graph with the same modules as `graph` and a gate on every edge that reads a prunable unit.

    Consumers that read the same axis of the same node share a gate. Edges on which units are `compared` may be left
    out: those are read in other places, too. With `branches`, the outputs of residual branches have gates, too, on
    edges whose one unit is that of all positions.
    """
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.graph, nodes))
    by_name = {node.name: copy for node, copy in nodes.items()}
    gated = OwnSource(graph, copied, type(graph).__name__)
    gates: list[Gate] = []
    changes = _changes(graph)
    for (source, dim, of_comparison), edges in _shared(coupling, compared=compared).items():
        name, chosen = f"gate_{source}_{dim}" + "_compared" * of_comparison, edges[0].chosen
        if chosen is not None:
            gates.append(make(edges[0]))
            gated.add_module(name, RoutedGate(gates[-1], len(edges[0].units)))
        elif isinstance(coupling.specs[source], PackedSpec):
            gates.append(make(replace(edges[0], dim=2)))
            gates[-1].key = edges[0].source, str(edges[0].dim)
            gated.add_module(name, PackedGate(gates[-1]))
        else:
            gates.append(make(edges[0]))
            gated.add_module(name, gates[-1])
        consumers = dict.fromkeys(by_name[edge.consumer] for edge in edges)
        inputs = (by_name[source], *(() if chosen is None else (by_name[chosen],)))
        _insert_gate(copied, inputs, name, consumers, changes.get(source, ()))
    for edge in branch_edges(coupling) if branches else ():
        gates.append(make(edge))
        gated.add_module(name := f"gate_{edge.source}_of_{edge.consumer}", gates[-1])
        _insert_gate(copied, (by_name[edge.source],), name, (by_name[edge.consumer],), ())
    for index, (path, inner) in enumerate(_inside(coupling, graph).items()):
        own = {parameter: make(edge) for parameter, edge in inner.items()}
        gates += own.values()
        gated.add_module(f"gated_{index}", gated_module(graph.get_submodule(path), own))
        for node in copied.nodes:
            if node.op == "call_module" and node.target == path:
                node.target = f"gated_{index}"
    copied.lint()
    gated.recompile()
    return gated, gates


def branch_edges(coupling: Coupling) -> list[Edge]:
    """The edges on which sums read the residual branches that can be removed."""
    return [
        Edge(own.total, own.branch, 0, np.array([own.unit]), whole=True) for own in coupling.residuals if own.unit >= 0
    ]


def _shared(coupling: Coupling, *, compared: bool) -> dict[tuple[str, int, bool], list[Edge]]:
    """The edges with units, by the node and the axis that they read, and whether they are compared."""
    shared: dict[tuple[str, int, bool], list[Edge]] = {}
    for edge in coupling.edges:
        if edge.parameter is None and (edge.units >= 0).any() and (compared or not edge.compared):
            shared.setdefault((edge.source, edge.dim, edge.compared), []).append(edge)
    return shared


def _inside(coupling: Coupling, graph: ModelGraph) -> dict[str, dict[str, Edge]]:
    """Recurrent layer -> its parameters that read units inside it, each with its edge; empty where nothing is pruned.

    An upper layer's input is gated as (samples, steps, channels).
    """
    targets = {node.name: str(node.target) for node in graph.graph.nodes}
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    found: dict[str, dict[str, Edge]] = {
        path: {} for path in sorted(called) if type(graph.get_submodule(path)) in (nn.RNN, nn.LSTM, nn.GRU)
    }
    for edge in coupling.edges:
        if edge.parameter is not None and (edge.units >= 0).any():
            dim = 2 if edge.parameter.startswith("weight_ih") else 1
            found.setdefault(targets[edge.consumer], {})[edge.parameter] = replace(edge, dim=dim)
    return found


def _insert_gate(
    graph: fx.Graph, inputs: tuple[fx.Node, ...], name: str, consumers: Iterable[fx.Node], changes: Iterable[str]
) -> None:
    """Call the gate before its first consumer, and again wherever its first input was changed in place since."""
    waiting, changed = dict.fromkeys(consumers), set(changes)
    gate: fx.Node | None = None
    for node in list(graph.nodes):
        if node in waiting:
            if gate is None:
                with graph.inserting_before(node):
                    gate = graph.call_module(name, inputs)
            node.replace_input_with(inputs[0], gate)
        if node.name in changed:
            gate = None


def _changes(graph: ModelGraph) -> dict[str, list[str]]:
    """Node -> the nodes that change its storage in place."""
    roots = roots_of(graph)
    changes = changes_of(graph, roots)
    return {node.name: [other.name for other in changes[root]] for node, root in roots.items() if root in changes}
