"""Two graphs, original and rewritten, run side by side over the calibration batches, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.gates import works_in_place

Values = list[Any]  # one a batch


class Stepper:
    """Runs a graph node by node, all batches at each, and lets go of values once nothing needs them any more.

    A value is needed until its last user has run and `passed` was called for its node.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> None:
        self.graph, self.inputs = graph, inputs
        self.nodes = list(graph.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.waiting = {node: len(node.users) + 1 for node in self.nodes}
        self.values: dict[fx.Node, Values] = {}
        self.next = 0
        self._arguments = [iter(batch) for batch in inputs]

    def to(self, node: fx.Node) -> Values:
        """Run all up to a node, and give its values."""
        while self.next <= self.place[node]:
            current = self.nodes[self.next]
            self.values[current] = self._run(current)
            for source in current.all_input_nodes:
                self._release(source)
            self.next += 1
        return self.values[node]

    def passed(self, node: fx.Node) -> None:
        """Say that nobody will ask for the values of a node any more."""
        self._release(node)

    def _release(self, node: fx.Node) -> None:
        self.waiting[node] -= 1
        if not self.waiting[node]:
            self.values.pop(node, None)

    def _run(self, node: fx.Node) -> Values:
        return [self._run_batch(node, index) for index in range(len(self.inputs))]

    def _run_batch(self, node: fx.Node, index: int) -> Any:
        if node.op == "placeholder":
            return next(self._arguments[index])
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(self.graph.get_submodule(path), name)
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self.values[source][index])
        if node.op == "output":
            return args[0]
        if works_in_place(node, self.graph) and len(node.all_input_nodes[0].users) == 1:
            args = (args[0].clone(), *args[1:])  # its own value may still be asked for
        if node.op == "call_module":
            return self.graph.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def live_bytes(graph: fx.GraphModule) -> int:
    """The most that the values of a graph take at once on its example, by the specs of its nodes."""
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
    size = torch.Size(shape).numel()
    return size * int(getattr(getattr(spec, "dtype", None), "itemsize", 4))
