"""How long every node of a graph takes at several widths."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.caller.arrays import Index, Scalars
from fxprune.caller.isolation import device_of, evaluating, undisturbed
from fxprune.coupling.groups import Coupling
from fxprune.errors import blaming
from fxprune.planning.allocation import Allocation
from fxprune.planning.costs import Accounts
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
    """Time every node of `graph`, whole and narrowed, on the device where it lies.

    Args:
        allocation: by its levels the widths are made at which nodes are timed.
        example: the batch to run; the one that the graph was captured with by default.
        repeats: runs of which the median is taken.
    """
    example = example_of(graph) if example is None else example
    names = [node.name for node in graph.graph.nodes]
    keeps = [allocation.keep(1 - share) for share in SHARES]
    with undisturbed(), torch.no_grad(), evaluating(graph):
        with blaming("the model", "the example"):
            graph(*placeholder_values(graph, example))
        times = [_node_times(rewrite(graph, coupling, keep), names, example, repeats) for keep in keeps]
        whole = _median_time(lambda: graph(*placeholder_values(graph, example)), graph, repeats)
    widths, work, node = _work(graph, coupling)
    works = np.stack([work_by_node(work.of(widths.under(keep)), node, len(names)) for keep in keeps], 1)
    seconds = np.minimum.accumulate(np.stack(times, 1)[:, ::-1], 1)[:, ::-1]
    seconds = np.where(works[:, :1] == works[:, -1:], seconds[:, -1:], seconds)
    total = float(seconds[:, -1].sum())
    seconds = seconds * min(1.0, whole / total)  # alone, a node waits for the device
    return Latency(widths, work, node, works, seconds, max(whole - total, 0.0), str(device_of(graph)))


def _work(graph: ModelGraph, coupling: Coupling) -> tuple[Widths, Products, Index]:
    """The work of every node as products of widths, and the node of each product."""
    ruler, counted = Ruler(coupling), flops_of(graph)
    accounts = Accounts(graph, ruler)
    rows: list[Product] = []
    owner: list[int] = []
    for index, node in enumerate(graph.graph.nodes):
        entries = (ruler.product(ruler.tensor(x)) for x in labels_in(coupling.values[node.name]))
        found = accounts.rows(node, counted[node.name]) if counted[node.name] else list(entries)
        rows += found
        owner += [index] * len(found)
    return ruler.widths(), products(rows), np.array(owner, dtype=np.int64)


class _Timed(fx.Interpreter):
    """Runs a graph and takes the time of every node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, list[float]] = {node.name: [] for node in graph.graph.nodes}
        self.device = device_of(graph)

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        wait_for(self.device)
        self.seconds[n.name].append(time.perf_counter() - start)
        return value


def _node_times(graph: ModelGraph, names: list[str], example: Any, repeats: int) -> Scalars:
    """The median time of each of the nodes `names`; a node that rewriting put in counts for the next of these."""
    timed = _Timed(graph)
    with evaluating(graph):
        for _ in range(WARM_UP + repeats):
            timed.run(*placeholder_values(graph, example))
    known = {name: index for index, name in enumerate(names)}
    times, waiting = np.zeros(len(names)), 0.0
    for name, seconds in timed.seconds.items():
        waiting += float(np.median(seconds[WARM_UP:]))
        if name in known:
            times[known[name]], waiting = waiting, 0.0
    return times


def _median_time(run: Callable[[], Any], graph: ModelGraph, repeats: int) -> float:
    taken = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        run()
        wait_for(device_of(graph))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[WARM_UP:]))


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
