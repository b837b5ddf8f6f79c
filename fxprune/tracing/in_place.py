"""Which nodes write into their inputs."""

from __future__ import annotations

import operator

from torch import fx

from fxprune.rules.arguments import Call
from fxprune.rules.table import key_of
from fxprune.tracing.graph import ModelGraph


def works_in_place(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name == "setitem" or name[:1] == "i"
    operators = node.op == "call_function" and getattr(operator, name, None) is node.target and in_place
    call = Call(key_of(node, graph) if node.op == "call_function" else "", node.args, node.kwargs)
    return bool(call.signature and call.get("inplace")) or operators or (name.endswith("_") and not name.endswith("__"))
