"""Which nodes write into their inputs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from fxprune.rules.arguments import Call
from fxprune.rules.table import key_of
from fxprune.tracing.graph import ModelGraph

_AUGMENTED = frozenset({
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "ilshift",
    "irshift",
})  # fmt: skip
ABOUT_GRADIENTS = ("requires_grad_", "detach_", "share_memory_")
_VIEWS = frozenset({
    "data", "detach", "view", "view_as", "reshape", "getitem", "select", "narrow", "squeeze", "unsqueeze", "transpose",
    "permute", "t", "T", "mT", "flatten", "expand", "unbind", "split", "chunk", "diagonal", "movedim", "unflatten",
})  # fmt: skip


def is_in_place(target: Any) -> bool:
    """Whether calls of a function or a method write into their first input, by its name.

    >>> is_in_place("add_"), is_in_place(operator.iadd), is_in_place(operator.and_)
    (True, True, False)
    """
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is target:
        return name == "setitem" or name in _AUGMENTED
    if name.endswith("__"):
        return name == "__setitem__" or name.strip("_") in _AUGMENTED
    return name.endswith("_") and name not in ABOUT_GRADIENTS


def written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[fx.Node]:
    """The nodes into whose tensors a call of `target` writes."""
    writes = is_in_place(target) or kwargs.get("inplace") is True
    for value in (*(args[:1] if writes else ()), kwargs.get("out")):
        yield from (node for node in (value if isinstance(value, (tuple, list)) else (value,)) if type(node) is fx.Node)


def viewed(node: fx.Node) -> fx.Node:
    """The node whose tensor a node is a view of, as far as names of operations tell."""
    while node.op in ("call_function", "call_method") and node.all_input_nodes:
        name = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
        if name not in _VIEWS:
            break
        node = node.all_input_nodes[0]
    return node


def works_in_place(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    call = Call(key_of(node, graph) if node.op == "call_function" else "", node.args, node.kwargs)
    return is_in_place(node.target) or bool(call.signature and call.get("inplace"))
