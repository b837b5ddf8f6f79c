"""The time that every node of a graph takes at several widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.caller.arrays import Index, Scalars
from fxprune.caller.isolation import device_of, evaluating, undisturbed
from fxprune.caller.timing import timed
from fxprune.coupling.groups import Coupling
from fxprune.errors import blaming
from fxprune.planning.allocation import Allocation
from fxprune.planning.costs import Accounts, owners_of
from fxprune.planning.latency import Latency, work_by_node
from fxprune.planning.widths import Product, Products, Ruler, Widths, products
from fxprune.rewriting.rewrite import rewrite
from fxprune.rules.context import labels_in
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph, example_of, flops_of

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of every group's units, at which nodes are timed
WARM_UP = 3


def measure(
    graph: ModelGraph, coupling: Coupling, allocation: Allocation, example: Any = None, *, repeats: int = 20
) -> Latency:
    """Time every node of `graph`, whole and narrowed by an allocation, on its device.

    `example` is the batch to run, by default that of the capture; the median of `repeats` runs counts.
    """
    example = example_of(graph) if example is None else example
    names, device = [node.name for node in graph.graph.nodes], device_of(graph)
    keeps = [allocation.keep(1 - share) for share in SHARES]
    with undisturbed(), torch.no_grad(), evaluating(graph):
        with blaming("the model", "the example"):
            graph(*placeholder_values(graph, example))
        times = [_node_times(rewrite(graph, coupling, keep), names, example, repeats) for keep in keeps]
        runs = [timed(lambda: graph(*placeholder_values(graph, example)), device)[1] for _ in range(WARM_UP + repeats)]
    whole = float(np.median(runs[WARM_UP:]))
    widths, work, node = _work(graph, coupling)
    works = np.stack([work_by_node(work.of(widths.under(keep)), node, len(names)) for keep in keeps], 1)
    seconds = np.minimum.accumulate(np.stack(times, 1)[:, ::-1], 1)[:, ::-1]
    seconds = np.where(works[:, :1] == works[:, -1:], seconds[:, -1:], seconds)
    total = float(seconds[:, -1].sum())
    seconds = seconds * min(1.0, whole / total)  # timed one by one, nodes wait for the device
    return Latency(widths, work, node, works, seconds, max(whole - total, 0.0), str(device))


def _work(graph: ModelGraph, coupling: Coupling) -> tuple[Widths, Products, Index]:
    """The work of every node as products of widths, and the node of each product."""
    ruler, counted = Ruler(coupling), flops_of(graph)
    accounts = Accounts(graph, ruler)
    rows, needed = list[Product](), owners_of(graph, coupling)
    owner: list[int] = []
    for index, node in enumerate(graph.graph.nodes):
        entries = (ruler.product(ruler.tensor(x)) for x in labels_in(coupling.values[node.name]))
        found = accounts.rows(node, counted[node.name]) if counted[node.name] else list(entries)
        units = tuple(map(ruler.unit, needed.get(node.name, ())))
        rows += [replace(row, axes=(*row.axes, *units)) for row in found]
        owner += [index] * len(found)
    return ruler.widths(), products(rows), np.array(owner, dtype=np.int64)


class _TimedNodes(fx.Interpreter):
    """Runs a graph and records the seconds of every node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, list[float]] = {node.name: [] for node in graph.graph.nodes}
        self.device = device_of(graph)

    def run_node(self, n: fx.Node) -> Any:
        run = super().run_node
        value, seconds = timed(lambda: run(n), self.device)
        self.seconds[n.name].append(seconds)
        return value


def _node_times(graph: ModelGraph, names: list[str], example: Any, repeats: int) -> Scalars:
    """The median seconds of each of the nodes `names`; a node that rewriting inserted counts for the next of these."""
    runs = _TimedNodes(graph)
    with evaluating(graph):
        for _ in range(WARM_UP + repeats):
            runs.run(*placeholder_values(graph, example))
    known = {name: index for index, name in enumerate(names)}
    times, inserted = np.zeros(len(names)), 0.0
    for name, seconds in runs.seconds.items():
        inserted += float(np.median(seconds[WARM_UP:]))
        if name in known:
            times[known[name]], inserted = inserted, 0.0
    return times
