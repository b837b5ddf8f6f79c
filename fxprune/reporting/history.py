"""The history of a rewritten graph, from which it can be made again from the architecture."""

from __future__ import annotations

import re

from torch import fx, nn

from fxprune.planning.plan import Plan
from fxprune.tracing.graph import History, ModelGraph, history_of

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def extended_history(graph: ModelGraph, small: ModelGraph, plan: Plan) -> History:
    """The history of `small`: that of `graph`, to which `plan` was applied, and one plan more.

    Where `graph` was pruned before, the structure is that of the graph before its first plan.
    """
    before = history_of(graph)
    return History((*before.plans, plan), before.structure or structure(graph), created_biases(graph, small))


def created_biases(graph: ModelGraph, small: ModelGraph) -> tuple[str, ...]:
    """The parameters that compensation created: those that `small` has and `graph` lacks, after those of `graph`."""
    old = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    names = [name for name, _ in small.named_parameters(remove_duplicate=False) if name not in old]
    return tuple(dict.fromkeys((*history_of(graph).biases, *names)))


def structure(graph: ModelGraph) -> tuple[str, ...]:
    """One line for each node: its call and arguments, and the settings of a module; no weights."""
    return tuple(_ADDRESS.sub("0x", _described(graph, node)) for node in graph.graph.nodes)


def _described(graph: ModelGraph, node: fx.Node) -> str:
    text = node.format_node() or ""
    if node.op != "call_module":
        return text
    return f"{text} {' '.join(_shown(graph.get_submodule(str(node.target))).split())}"


def _shown(module: nn.Module) -> str:
    """A module's type and settings; its type alone where it fails to show itself."""
    try:
        return repr(module)
    except Exception:  # noqa: BLE001 - whatever the extra_repr of a class of the user's does
        return type(module).__name__
