"""The mending of one node of a rewritten graph, and the nodes that it inserts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxprune.caller.meta import home_of
from fxprune.caller.tensors import INDEX
from fxprune.rules.labels import Labels
from fxprune.rules.table import Key, key_of

SHARE = "share_of_size_"  # prefix of nodes that compute a share of a size
PERMUTE = f"{INDEX}before_"  # prefix of indices that permute channels before a movement


@dataclass(frozen=True, slots=True)
class Mending:
    """A node to mend: values of the original graph by node name, new values by node, and the value that it should get.

    `masks` gives the kept indices of each axis of a value of the original graph; `grows` tells whether an axis of a
    node's value is longer for longer inputs.
    """

    graph: fx.GraphModule
    node: Any  # a torch.fx.Node; its arguments are anything
    old: Mapping[str, Any]
    env: dict[fx.Node, Any]
    expected: Any
    masks: Callable[[Labels], list[Tensor]]
    grows: Callable[[str, int], bool]

    @property
    def source(self) -> fx.Node:
        """The first input node."""
        source: fx.Node = self.node.all_input_nodes[0]
        return source

    @property
    def before(self) -> Any:
        """The value of the first input in the original graph."""
        return self.old[self.source.name]

    @property
    def now(self) -> Any:
        """The value of the first input in the rewritten graph."""
        return self.env[self.source]

    @property
    def key(self) -> Key:
        """The operation that the node calls; "" where it calls none."""
        return key_of(self.node, self.graph) if self.node.op.startswith("call") else ""

    def changed(self, node: fx.Node) -> bool:
        """Whether an input is a number, or several, that differs from the original's; an inserted node is not."""
        known = node.name in self.old and node in self.env and not isinstance(self.env[node], Labels)
        return known and bool(self.env[node] != self.old[node.name])

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The node's arguments with the original's numbers and labels in the place of nodes."""
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda n: self.old[n.name])
        return args, kwargs

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument of the node by place or name."""
        args = self.node.args
        return self.node.kwargs.get(name, args[place] if len(args) > place else default)

    def become(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Turn the node into another one under the same name."""
        self.node.op, self.node.target = op, target
        self.node.args, self.node.kwargs = args, kwargs or {}

    def insert(self, target: Any, *args: Any, op: str = "call_function", **kwargs: Any) -> fx.Node:
        """A new node in front of the node."""
        with self.graph.graph.inserting_before(self.node):
            return self.graph.graph.create_node(op, target, args, kwargs, name=f"{SHARE}{self.node.name}")

    def insert_index(self, index: Tensor, prefix: str = INDEX) -> fx.Node:
        """A new node in front of the node that gives `index`, a buffer outside the state_dict."""
        name = f"{prefix}{self.node.name}"
        while hasattr(self.graph, name):
            name += "_"
        device = next((t.device for t in (*self.graph.parameters(), *self.graph.buffers())), torch.device("cpu"))
        self.graph.register_buffer(name, index.to(home_of(device)), persistent=False)
        with self.graph.graph.inserting_before(self.node):
            return self.graph.graph.get_attr(name)


def is_inserted(node: fx.Node, known: Collection[str]) -> bool:
    """Whether mending inserted a node: a share of a size, an index, or a permutation before a movement.

    `known` are the names of the nodes and tensors that the graph had before.
    """
    if node.name.startswith(SHARE):
        return node.name not in known
    holders = [node] if node.op == "get_attr" else [n for n in node.all_input_nodes if n.op == "get_attr"]
    prefix = INDEX if node.op == "get_attr" else PERMUTE
    return any(str(holder.target).startswith(prefix) and holder.target not in known for holder in holders)
