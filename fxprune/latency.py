"""A model's time under any plan, estimated from the times of its nodes at a few widths on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxprune.allocate import Allocation
from fxprune.caller.isolation import device_of, evaluating, undisturbed
from fxprune.costing import Accounts
from fxprune.errors import blaming
from fxprune.groups import Coupling
from fxprune.rewrite import rewrite
from fxprune.rules.context import labels_in
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph, example_of, flops_of
from fxprune.widths import Flags, Index, Product, Products, Ruler, Widths, products

Scalars = NDArray[np.float64]
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of every group's units, at which nodes are timed
WARM_UP = 3


@dataclass(frozen=True, slots=True, eq=False)
class Latency:
    """Seconds that a model takes under any plan: `rest`, and for each node a line through the times measured.

    `work` are products of widths, `node[i]` the node whose work product i is a part of: flops, or the entries that a
    node without flops gives. `works` and `seconds` (nodes, widths) hold every node's work and time at the widths that
    were timed. Below the narrowest, the time stays.
    """

    widths: Widths
    work: Products
    node: Index
    works: Scalars
    seconds: Scalars
    rest: float
    device: str

    def estimate(self, keep: Flags) -> float:
        """Seconds of one run where the units `keep` stay."""
        return self.rest + float(_interpolated(self._works(keep), self.works, self.seconds).sum())

    def _works(self, keep: Flags) -> Scalars:
        return _by_node(self.work.of(self.widths.under(keep)), self.node, len(self.seconds))

    def arrays(self) -> dict[str, Any]:
        """The numbers, as arrays of their names."""
        own = {"node": self.node, "works": self.works, "seconds": self.seconds}
        return self.widths.arrays() | self.work.arrays("work") | own

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any], rest: float, device: str) -> Latency:
        """The table that `arrays` were taken from."""
        widths, work = Widths.of_arrays(arrays), Products.of_arrays(arrays, "work")
        return cls(widths, work, arrays["node"], arrays["works"], arrays["seconds"], rest, device)


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
    works = np.stack([_by_node(work.of(widths.under(keep)), node, len(names)) for keep in keeps], 1)
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


def _by_node(numbers: Index, node: Index, count: int) -> Scalars:
    """The sum of each node's products."""
    return np.bincount(node, weights=numbers, minlength=count).astype(np.float64)


def _interpolated(x: Scalars, works: Scalars, seconds: Scalars) -> Scalars:
    """For each row, the line through its points (rising works, seconds) at x, level outside of them."""
    rows, last = np.arange(len(x)), works.shape[1] - 1
    right = np.clip((x[:, None] > works).sum(1), 1, last)
    span = works[rows, right] - works[rows, right - 1]
    part = np.clip((x - works[rows, right - 1]) / np.where(span > 0, span, 1), 0, 1)
    part = np.where(span > 0, part, 1)
    result: Scalars = seconds[rows, right - 1] * (1 - part) + seconds[rows, right] * part
    return result


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
