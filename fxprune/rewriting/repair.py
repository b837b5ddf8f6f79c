"""A node to mend, and the nodes that mending inserts."""

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

SHARE = "share_of_size_"  # prefix of the nodes that compute a share of a size

PERMUTE = f"{INDEX}before_"  # of those that permute channels in front of a movement


@dataclass(frozen=True, slots=True)
class Repair:
    """A node to mend: values of the original graph by node name, new values by node, the value that it should get.

    `masks` tells for a value of the original graph which indices of each axis stay, `grows` whether an axis of a node's
    value is longer for longer inputs.
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

    def changed(self, node: fx.Node) -> bool:
        """Whether an input is a number, or several, and another one than in the original; what was inserted is not."""
        if node.name not in self.old:
            return False
        return node in self.env and not isinstance(self.env[node], Labels) and self.env[node] != self.old[node.name]

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The node's arguments with the original's numbers and labels in the place of nodes."""
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda n: self.old[n.name])
        return args, kwargs

    def become(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Turn the node into another one under the same name."""
        self.node.op, self.node.target = op, target
        self.node.args, self.node.kwargs = args, kwargs or {}


def is_inserted(node: fx.Node, known: Collection[str]) -> bool:
    """Whether mending put this node in: a gathering index, a permutation in front of a movement, a share of a size.

    `known` are the names of the nodes and tensors that the graph had before.
    """
    if node.name.startswith(SHARE):
        return node.name not in known
    holders = [node] if node.op == "get_attr" else [n for n in node.all_input_nodes if n.op == "get_attr"]
    prefix = INDEX if node.op == "get_attr" else PERMUTE
    return any(str(holder.target).startswith(prefix) and holder.target not in known for holder in holders)


def index_node(repair: Repair, index: Tensor, name: str = "") -> fx.Node:
    """A node that gives `index`, kept as a buffer outside the state_dict."""
    name = name or f"{INDEX}{repair.node.name}"
    while hasattr(repair.graph, name):
        name += "_"
    device = next((t.device for t in (*repair.graph.parameters(), *repair.graph.buffers())), torch.device("cpu"))
    repair.graph.register_buffer(name, index.to(home_of(device)), persistent=False)
    with repair.graph.graph.inserting_before(repair.node):
        return repair.graph.graph.get_attr(name)
