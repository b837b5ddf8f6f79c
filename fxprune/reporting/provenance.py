"""What a rewritten model remembers of its making, so that it can be made again from the architecture."""

from __future__ import annotations

import re

from torch import fx

from fxprune.planning.plan import Plan
from fxprune.tracing.graph import History, ModelGraph, history_of

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def extended_history(graph: ModelGraph, small: ModelGraph, plan: Plan) -> History:
    """The history of `small`, that of `graph` and one plan more.

    `graph` is what `plan` was applied to. Where that was pruned before, its plans come first, and the structure is that
    of what they start from.
    """
    before = history_of(graph)
    return History((*before.plans, plan), before.structure or structure(graph), new_biases(graph, small))


def new_biases(graph: ModelGraph, small: ModelGraph) -> tuple[str, ...]:
    """The parameters that `small` has and `graph` has not: those that compensation created, and only those.

    Where `graph` was pruned before, those that came then are kept in mind.
    """
    old = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    names = [name for name, _ in small.named_parameters(remove_duplicate=False) if name not in old]
    return tuple(dict.fromkeys((*history_of(graph).biases, *names)))


def structure(graph: ModelGraph) -> tuple[str, ...]:
    """One line a node: what it calls and with what; for a module its type and settings. No weights are looked at."""
    return tuple(_ADDRESS.sub("0x", _described(graph, node)) for node in graph.graph.nodes)


def _described(graph: ModelGraph, node: fx.Node) -> str:
    text = node.format_node() or ""
    if node.op != "call_module":
        return text
    return f"{text} {' '.join(repr(graph.get_submodule(str(node.target))).split())}"
