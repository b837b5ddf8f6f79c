"""Measured curves: each group is pruned alone to a few depths, and the outputs are compared with the original's.

Layers that read removed units read a prediction from the kept units instead, as after a refit of these layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.caller.batches import sample_count
from fxprune.caller.isolation import evaluating
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
from fxprune.tracing.graph import ModelGraph, example_of, flops_of
from fxprune.tracing.in_place import works_in_place

DEPTHS = (  # shares of a group that are removed; the last leaves one unit. The first row that is fast enough is used.
    (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0),
    (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0),
    (1 / 4, 1 / 2, 1.0),
)
MOST, FEWEST = 64, 4  # samples that the outputs are compared on
WORK = 3  # forward passes over all samples that the curves may take, or `FLOPS` if these are more
FLOPS = 3e11
WIDEST = 2048  # channels of an edge that are predicted from the others; on wider edges, means replace them
EPSILON = 1e-12  # of the model's cost, which a unit saves at least
MEMORY = 1 << 30  # bytes for all values of a graph on those samples
NO_BRANCHES: Scalars = np.zeros(0)  # what the removal of each branch saves, where there is none


class PredictionGate(Gate):
    """The gate of one edge: passes values on, or the removed units' prediction from the kept ones in their place."""

    def __init__(self, edge: Edge, moments: Mapping[Key, Moments]) -> None:
        super().__init__(edge)
        self.moments, self.whole, self.gone = moments.get(self.key), edge.whole, False
        self.map: Tensor | None = None
        self.offset: Tensor | None = None

    def remove(self, keep: Flags) -> bool:
        """Replace the units without `keep` from now on; returns whether there are any."""
        kept = np.append(keep, True)[self.units]
        self.map, self.offset, self.gone = None, None, self.whole and not kept.all()
        if kept.all() or self.whole:
            return self.gone
        by_kept, offset = np.diag(kept.astype(np.float64)), np.zeros(len(kept))
        if self.moments is not None:
            found = prediction(self.moments, kept, linear=len(kept) <= WIDEST)
            by_kept, offset = by_kept + found.map, found.offset
        self.map, self.offset = torch.from_numpy(by_kept), torch.from_numpy(offset)
        return True

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        if self.gone:
            return torch.zeros_like(x)
        if self.map is None or self.offset is None:
            return x
        if self.compared:
            kept = self.map.diagonal().bool().to(x.device)
            return torch.where(kept.view([-1] + [1] * (x.ndim - 1 - self.dim % x.ndim)), x, x.new_full((), -torch.inf))
        mixed = x.movedim(self.dim, -1) @ self.map.T.to(x) + self.offset.to(x)
        return mixed.movedim(-1, self.dim)

    def weigh(self, weight: Tensor) -> Tensor:
        return weight if self.map is None else weight @ self.map.to(weight)


class Suffixes:
    """The values of all nodes of a graph on one batch, and the graph's output after some modules changed."""

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
        """The value of a node; it works in place only on copies."""
        env = {source: inputs[source] for source in node.all_input_nodes}
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and works_in_place(node, self.graph):
            env[first] = pytree.tree_map_only(Tensor, torch.clone, env[first])
        self.runner.env = env
        return self.runner.run_node(node)


def measured_curves(
    graph: ModelGraph, coupling: Coupling, moments: Mapping[Key, Moments], allocation: Allocation,
    signals: Sequence[Scalars], data: Calibration, divergence: Divergence, *, alone: bool = False,
    saved: Scalars = NO_BRANCHES, work: float = WORK, flops: float = FLOPS, memory: int = MEMORY,
) -> Curves:  # fmt: skip
    """The divergence of a graph's outputs for every bundle of groups, pruned alone to a few depths.

    From each depth to the next, each of the `signals` proposes the remaining units that it ranks lowest, and the
    proposal that moves the outputs least is removed. Only the first signal is used where several would take too long:
    more than `work` forward passes over all samples, and than so many `flops`. All values of a graph take at most
    `memory` bytes. Residual branches are removed one by one, see `_greedy`, by what each has `saved`; with `alone`,
    only they are.
    """
    gated, gates = insert(graph, coupling, lambda edge: PredictionGate(edge, moments), branches=True)
    fuse(gated, coupling.specs)
    found, count = bundles(allocation), int(data.summed(torch.tensor(sum(map(len, data.held)))))
    branches = {own.unit for own in coupling.residuals}
    depths_of = partial(_depths, allocation, found, branches, alone=alone)
    a_sample = sum(flops_of(graph).values()) / sample_count(example_of(graph))
    passes = max(work * count, flops / max(a_sample, 1.0))  # of a sample
    shares, tried = next(
        (shares, tried)
        for shares, tried in [*((s, t) for s in DEPTHS for t in (len(signals), 1)), (DEPTHS[-1], 1)]
        if _work(depths_of, shares) * tried * FEWEST <= passes or (shares is DEPTHS[-1] and tried == 1)
    )
    at_once = memory * sample_count(example_of(graph)) // max(all_bytes(graph), 1)
    samples = max(FEWEST, min(MOST, int(passes / max(_work(depths_of, shares) * tried, 1e-9))))
    samples = max(1, min(-(-samples // data.ranks), at_once))  # of this rank
    order, depths, values = list[Index](), list[int](), list[float]()
    with torch.no_grad(), evaluating(gated):
        judge = Judge(gated, gates, coupling.units, data.with_fewer(samples), divergence)
        for units, ends in zip(found, depths_of(shares), strict=True):
            is_branch = int(units[0]) in branches
            own, curve = (
                _greedy(judge, units, saved) if is_branch else _curve(judge, allocation, units, ends, signals[:tried])
            )
            order.append(own)
            depths += [depth for depth, _ in curve]
            values += [value for _, value in curve]
    starts = np.cumsum([0, *map(len, depths_of(shares))])
    return Curves(starts, np.array(depths, dtype=np.int64), np.array(values, dtype=np.float64), np.concatenate(order))


def _depths(
    allocation: Allocation, found: Sequence[Index], branches: Collection[int], shares: Sequence[float], *, alone: bool
) -> list[list[int]]:
    """For each bundle the numbers of units to remove: one unit is left, or as many as are chosen at once.

    Groups that keep equal numbers lose equal numbers. All branches are removed, or no others where they are `alone`.
    """
    each = [allocation.at_once(units) for units in found]
    most = [len(units) - max(n, allocation.fewest(units)) for units, n in zip(found, each, strict=True)]
    return [
        list(range(1, len(units) + 1))
        if int(units[0]) in branches
        else sorted({min(max(1, round(share * len(units) / n)) * n, end // n * n) for share in shares} - {0})
        * (not alone)
        for units, n, end in zip(found, each, most, strict=True)
    ]


def _work(depths_of: Callable[[Sequence[float]], list[list[int]]], shares: Sequence[float]) -> float:
    """About how many forward passes one sample takes: half of the network lies behind a group."""
    return sum(map(len, depths_of(shares))) / 2


def _curve(
    judge: Judge, allocation: Allocation, units: Index, depths: Sequence[int], signals: Sequence[Scalars]
) -> tuple[Index, list[tuple[int, float]]]:
    """The order of removal of a bundle's units, and the divergence at each depth."""
    removed, curve = units[:0], list[tuple[int, float]]()
    for depth in depths:
        tries = [_next(allocation, units, removed, depth, signal) for signal in signals]
        found = [judge(np.append(removed, more)) for more in tries]
        best = int(np.argmin(found))
        removed = np.append(removed, tries[best])
        curve.append((depth, found[best]))
    rest = _next(allocation, units, removed, len(units), signals[0])
    return np.append(removed, rest), curve


def _greedy(judge: Judge, units: Index, saved: Scalars) -> tuple[Index, list[tuple[int, float]]]:
    """The order in which residual branches are removed, and the divergence after each.

    The next is the one whose removal, beside those before it, moves the outputs least for what it saves. Branches are
    measured again only while their last figure, with fewer others removed, was the lowest: most figures rise.
    """
    removed, now, curve = units[:0], 0.0, list[tuple[int, float]]()
    figures = {int(unit): (-np.inf, 0.0, -1) for unit in units}  # the rise, the divergence, and the depth they are of
    while figures:
        unit = min(figures, key=lambda unit: figures[unit][0])
        if figures[unit][2] < len(removed):
            value = judge(np.append(removed, unit))
            figures[unit] = (value - now) / max(float(saved[unit]), EPSILON), value, len(removed)
            continue
        now = figures.pop(unit)[1]
        removed = np.append(removed, unit)
        curve.append((len(removed), now))
    return removed, curve


def _next(allocation: Allocation, units: Index, removed: Index, depth: int, signal: Scalars) -> Index:
    """The next units of a bundle to be removed, up to so many in all: equal shares of its groups, lowest first."""
    left = np.setdiff1d(units, removed)
    late = replace(allocation, level=np.zeros(len(signal)), propose=np.where(_in(removed, signal), -np.inf, signal))
    return left[np.argsort(late.late()[left], kind="stable")][: depth - len(removed)]


def _in(units: Index, like: Scalars) -> Flags:
    marks = np.zeros(len(like), dtype=np.bool_)
    marks[units] = True
    return marks


class Judge:
    """The divergence of a gated graph's outputs without some units, on the samples that are held out."""

    def __init__(
        self, gated: fx.GraphModule, gates: Sequence[Gate], units: int, data: Calibration, divergence: Divergence
    ) -> None:
        self.units, self.data = units, data
        self.gates = [gate for gate in gates if isinstance(gate, PredictionGate)]
        self.names = {id(gate): name for name, part in gated.named_children() for gate in _gates_in(part)}
        self.batches = [(Suffixes(gated, values), len(mask)) for values, mask in data.judged(gated)]
        self.divergence = divergence.scaled([part.output() for part, _ in self.batches], data.summed)

    def __call__(self, removed: Index) -> float:
        """The divergence without the units `removed`."""
        keep = ~_in(removed, np.empty(self.units))
        changed = {self.names[id(gate)] for gate in self.gates if gate.remove(keep)}
        parts = [[n * self.divergence(part.output(), part.output(changed)), n] for part, n in self.batches]
        for gate in self.gates:
            gate.map, gate.offset, gate.gone = None, None, False
        total, count = self.data.summed(torch.tensor(parts, dtype=torch.float64).sum(0)).tolist()
        return float(total / count)


def _gates_in(module: nn.Module) -> list[nn.Module]:
    """The gates that a module of a gated graph is or holds."""
    held = getattr(module, "gates", None)
    return [module, *(held.values() if isinstance(held, dict) else ()), *module.children()]
