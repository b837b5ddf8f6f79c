"""Running a graph node by node over all calibration batches at once, so that two graphs can run in lockstep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import blaming
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.in_place import works_in_place

Values = list[Any]  # one for each batch


class Stepper(fx.Interpreter):
    """Runs a graph node by node, all batches at each, and drops values that are no longer needed.

    A value is needed until its last user has run and `passed` was called for its node. The inputs do not change.
    Messages call the batches by `numbers`.
    """

    module: ModelGraph

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[Sequence[Any]], numbers: Sequence[int] | None = None
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.numbers = range(len(inputs)) if numbers is None else numbers
        self.nodes = list(graph.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.waiting = {node: len(node.users) + 1 for node in self.nodes}
        self.values: dict[fx.Node, Values] = {}
        self.next = self.behind = 0
        self._inputs = [iter(batch) for batch in inputs]

    def to(self, node: fx.Node) -> Values:
        """Run all nodes up to this one, and return its values."""
        while self.next <= self.place[node]:
            current = self.nodes[self.next]
            self.values[current] = [self._value(current, batch) for batch in range(len(self._inputs))]
            for source in current.all_input_nodes:
                self._release(source)
            self.next += 1
        return self.values[node]

    def seen(self, node: fx.Node) -> Values | None:
        """The values of a node, or None where they were dropped."""
        return self.values.get(node) if self.next > self.place[node] else self.to(node)

    def passed(self, node: fx.Node) -> None:
        """Declare that the values of this node, and of those before it, are not asked for any more."""
        self.to(node)
        while self.behind <= self.place[node]:
            self._release(self.nodes[self.behind])
            self.behind += 1

    def saved(self) -> Callable[[], None]:
        """A function that restores the run as it is now."""
        kept = dict(self.values), dict(self.waiting), self.next, self.behind, [copy.copy(i) for i in self._inputs]

        def restore() -> None:
            values, waiting, self.next, self.behind, inputs = kept
            self.values, self.waiting, self._inputs = dict(values), dict(waiting), [copy.copy(i) for i in inputs]

        return restore

    def _release(self, node: fx.Node) -> None:
        self.waiting[node] -= 1
        if not self.waiting[node]:
            del self.values[node]

    def _value(self, node: fx.Node, batch: int) -> Any:
        """The value of a node on a batch. An input that it alone reads and changes is cloned: `to` may return it."""
        self.args_iter = self._inputs[batch]
        self.env = {source: self.values[source][batch] for source in node.all_input_nodes}
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and len(first.users) == 1 and works_in_place(node, self.module):
            self.env[first] = pytree.tree_map_only(Tensor, torch.clone, self.env[first])
        with blaming(f"{node.name} of the model", f"batch {self.numbers[batch]}"):
            value = self.run_node(node)
        self.env = {}
        return pytree.tree_map_only(Tensor, torch.clone, value) if node.op == "placeholder" else value


def all_bytes(graph: fx.GraphModule) -> int:
    """The bytes that all values of a graph take on its example, by the specs of its nodes."""
    return sum(map(_bytes, graph.graph.nodes))


def live_bytes(graph: fx.GraphModule) -> int:
    """The most bytes that the values of a graph take at once on its example, by the specs of its nodes."""
    waiting = {node: len(node.users) for node in graph.graph.nodes}
    now = most = 0
    for node in graph.graph.nodes:
        now += _bytes(node)
        most = max(most, now)
        for source in node.all_input_nodes:
            waiting[source] -= 1
            now -= 0 if waiting[source] else _bytes(source)
    return most


def _bytes(node: fx.Node) -> int:
    spec = node.meta.get("spec")
    shape = getattr(spec, "shape", None)
    if node.op == "get_attr" or shape is None:
        return 0
    return torch.Size(shape).numel() * int(getattr(getattr(spec, "dtype", None), "itemsize", 4))
