"""Running a graph node by node over all calibration batches at once, so that two graphs can go in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.caller.tensors import attribute_at
from fxprune.errors import blaming
from fxprune.tracing.in_place import works_in_place

Values = list[Any]  # one a batch


class Stepper:
    """Runs a graph node by node, all batches at each, and lets go of values once nothing needs them any more.

    A value is needed until its last user has run and `passed` was called for its node. The inputs stay as they are.
    `numbers` are those by which messages call the batches.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[Sequence[Any]], numbers: Sequence[int] | None = None
    ) -> None:
        self.graph, self.inputs = graph, inputs
        self.numbers = range(len(inputs)) if numbers is None else numbers
        self.nodes = list(graph.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.waiting = {node: len(node.users) + 1 for node in self.nodes}
        self.values: dict[fx.Node, Values] = {}
        self.next = self.behind = 0
        self._arguments = [iter(batch) for batch in inputs]

    def to(self, node: fx.Node) -> Values:
        """Run all up to a node, and give its values."""
        while self.next <= self.place[node]:
            current = self.nodes[self.next]
            self.values[current] = [self._told(current, batch) for batch in range(len(self.inputs))]
            for source in current.all_input_nodes:
                self._release(source)
            self.next += 1
        return self.values[node]

    def seen(self, node: fx.Node) -> Values | None:
        """The values of a node, or None where they were let go of."""
        return self.values.get(node) if self.next > self.place[node] else self.to(node)

    def passed(self, node: fx.Node) -> None:
        """Say that nobody will ask for the values of a node, or of one before it, any more."""
        self.to(node)
        while self.behind <= self.place[node]:
            self._release(self.nodes[self.behind])
            self.behind += 1

    def _release(self, node: fx.Node) -> None:
        self.waiting[node] -= 1
        if not self.waiting[node]:
            del self.values[node]

    def _told(self, node: fx.Node, batch: int) -> Any:
        with blaming(f"{node.name} of the model", f"batch {self.numbers[batch]}"):
            return self._run(node, batch)

    def _run(self, node: fx.Node, batch: int) -> Any:
        """What a node gives on a batch."""
        if node.op == "placeholder":
            return pytree.tree_map_only(Tensor, torch.clone, next(self._arguments[batch]))
        if node.op == "get_attr":
            return attribute_at(self.graph, str(node.target))
        args: tuple[Any, ...]
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self.values[source][batch])
        if node.op == "output":
            return args[0]
        return self._called(node, self._apart(node, args), kwargs)

    def _apart(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call; what only it reads, and would write into, is cloned: it may still be asked for."""
        graph: Any = self.graph
        written = args and isinstance(args[0], Tensor) and works_in_place(node, graph)
        return (args[0].clone(), *args[1:]) if written and len(node.all_input_nodes[0].users) == 1 else args

    def _called(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self.graph.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        call: Any = node.target
        return call(*args, **kwargs)


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
