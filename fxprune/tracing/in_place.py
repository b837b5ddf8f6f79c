"""Which nodes write into their inputs."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxprune.rules.arguments import Call
from fxprune.rules.table import key_of
from fxprune.tracing.graph import ModelGraph

_AUGMENTED = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def is_in_place(target: Any) -> bool:
    """Whether calls of a function or a method write into their first input, by its name.

    >>> is_in_place("add_"), is_in_place(operator.iadd), is_in_place(operator.and_)
    (True, True, False)
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return name == "setitem" or name in _AUGMENTED
    return name.endswith("_") and not name.endswith("__")


def works_in_place(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    call = Call(key_of(node, graph) if node.op == "call_function" else "", node.args, node.kwargs)
    return is_in_place(node.target) or bool(call.signature and call.get("inplace"))
