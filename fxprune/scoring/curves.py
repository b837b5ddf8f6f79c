"""Measured curves: each group is pruned alone to a few depths, and the outputs are compared with the original's.

What reads removed units reads their prediction from the kept ones instead, as after a refit of the layers behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arrays import Flags, Index
from fxprune.caller.batches import sample_count
from fxprune.caller.isolation import device_of, evaluating
from fxprune.coupling.gates import Gate, insert
from fxprune.coupling.groups import Coupling, Edge, Key
from fxprune.planning.allocation import Allocation
from fxprune.planning.curves import Curves, bundles
from fxprune.scoring.calibration import Calibration, Inputs
from fxprune.scoring.divergence import Divergence
from fxprune.scoring.eval_graph import fuse
from fxprune.scoring.lockstep import all_bytes
from fxprune.scoring.moments import Moments
from fxprune.scoring.prediction import prediction
from fxprune.tracing.graph import ModelGraph, example_of
from fxprune.tracing.in_place import works_in_place

DEPTHS = (  # shares of a group that are removed; the last leaves one unit. The first that is not too much is taken.
    (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0),
    (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0),
    (1 / 4, 1 / 2, 1.0),
)
MOST, FEWEST = 64, 4  # samples that the outputs are compared on
WORK = 6  # forward passes over all samples that the curves may take at most, as far as `FEWEST` allows
MEMORY = 1 << 30  # bytes for all values of a graph on some samples


class PredictionGate(Gate):
    """The gate of one edge: passes values on, or the removed units' prediction from the kept ones in their place."""

    def __init__(self, edge: Edge, moments: Mapping[Key, Moments]) -> None:
        super().__init__(edge)
        self.moments = moments.get(self.key)
        self.map: Tensor | None = None
        self.offset: Tensor | None = None

    def remove(self, keep: Flags, device: torch.device) -> bool:
        """Replace the units without `keep` from now on; returns whether there are any."""
        kept = np.append(keep, True)[self.units]
        self.map = self.offset = None
        if kept.all():
            return False
        by_kept, offset = np.diag(kept.astype(np.float64)), np.zeros(len(kept))
        if self.moments is not None:
            found = prediction(self.moments, kept, linear=True)
            by_kept, offset = by_kept + found.map, found.offset
        self.map, self.offset = (torch.from_numpy(array).to(device, torch.float32) for array in (by_kept, offset))
        return True

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        if self.map is None or self.offset is None:
            return x
        mixed = x.movedim(self.dim, -1) @ self.map.T.to(x.dtype) + self.offset.to(x.dtype)
        return mixed.movedim(-1, self.dim)

    def weigh(self, weight: Tensor) -> Tensor:
        return weight if self.map is None else weight @ self.map.to(weight.dtype)


class Suffixes:
    """The values of all nodes of a graph on one batch, and what becomes of its output when some modules change."""

    def __init__(self, graph: fx.GraphModule, values: Inputs) -> None:
        self.graph: Any = graph
        self.runner = fx.Interpreter(graph, garbage_collect_values=False)
        self.runner.args_iter = iter(values)
        self.values: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            self.values[node] = self._value(node, self.values)

    def output(self, changed: Iterable[str] = ()) -> Any:
        """The output after modules of these names changed: only nodes behind their calls run again."""
        names, new = set(changed), dict[fx.Node, Any]()
        for node in self.graph.graph.nodes:
            called = node.op == "call_module" and node.target in names
            if called or not new.keys().isdisjoint(node.all_input_nodes):
                inputs = {source: new.get(source, self.values[source]) for source in node.all_input_nodes}
                new[node] = self._value(node, inputs)
        return new.get(node, self.values[node])

    def _value(self, node: fx.Node, inputs: Mapping[fx.Node, Any]) -> Any:
        """The value of a node; what it changes in place is a copy."""
        env = {source: inputs[source] for source in node.all_input_nodes}
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and works_in_place(node, self.graph):
            env[first] = pytree.tree_map_only(Tensor, torch.clone, env[first])
        self.runner.env = env
        return self.runner.run_node(node)


def measured_curves(
    graph: ModelGraph, coupling: Coupling, moments: Mapping[Key, Moments], allocation: Allocation, data: Calibration,
    divergence: Divergence,
) -> Curves:  # fmt: skip
    """The divergence of a graph's outputs for every bundle of groups, pruned alone to a few depths."""
    gated, gates = insert(graph, coupling, lambda edge: PredictionGate(edge, moments))
    fuse(gated, coupling.specs)
    order, device = bundles(allocation), device_of(graph)
    points = _points(order, sum(map(len, data.held)))
    judges = data.with_fewer(max(FEWEST, min(MOST, 2 * WORK * sum(map(len, data.held)) // max(len(points), 1))))
    at_once = MEMORY * sample_count(example_of(graph)) // max(all_bytes(graph), 1)
    values, total = np.zeros(len(points)), 0
    with torch.no_grad(), evaluating(gated):
        for batch, mask in judges.judged(graph, max(at_once, 1)):
            suffixes, total = Suffixes(gated, batch), total + len(mask)
            goal = suffixes.output()
            for place, (bundle, depth) in enumerate(points):
                changed = _removed(gated, gates, order[bundle][:depth], coupling.units, device)
                values[place] += len(mask) * divergence(goal, suffixes.output(changed))
    counts = np.bincount([bundle for bundle, _ in points], minlength=len(order))
    depths = np.array([depth for _, depth in points], dtype=np.int64)
    return Curves(np.append(0, np.cumsum(counts)), depths, values / max(total, 1))


def _points(order: Sequence[Index], samples: int) -> list[tuple[int, int]]:
    """The (bundle, depth) to be measured: as many depths as can be measured on some samples of so many."""
    for shares in DEPTHS:
        points = [
            (bundle, depth)
            for bundle, units in enumerate(order)
            for depth in sorted({min(max(1, round(share * len(units))), len(units) - 1) for share in shares} - {0})
        ]
        if len(points) * 2 * FEWEST <= 2 * WORK * samples:
            break
    return points


def _removed(
    gated: fx.GraphModule, gates: Sequence[Gate], removed: Index, units: int, device: torch.device
) -> list[str]:
    """The modules of a gated graph that change by the removal of some units, and of no others."""
    keep = np.ones(units, dtype=np.bool_)
    keep[removed] = False
    changed = {id(gate) for gate in gates if isinstance(gate, PredictionGate) and gate.remove(keep, device)}
    return [name for name, module in gated.named_children() if changed & _gates_in(module)]


def _gates_in(module: nn.Module) -> set[int]:
    """The gates that a module is or holds."""
    held = getattr(module, "gates", None)
    return {id(module), id(getattr(module, "gate", None)), *map(id, held.values() if isinstance(held, dict) else ())}
