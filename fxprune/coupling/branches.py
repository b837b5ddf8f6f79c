"""Branches of experts: the nodes of a graph that do something only for rows that have chosen one expert."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxprune.rules import contractions, layers, movement, norms, pointwise
from fxprune.rules.table import RULES, key_of
from fxprune.rules.vocabulary import CASTS
from fxprune.tracing.dependence import name_of

ROWS, ZERO = "rows", "zero"  # what a value of a branch is without the expert: without rows, or zero everywhere
_BY_ROW = {module.__name__ for module in (contractions, layers, movement, norms, pointwise)}
_QUESTIONS = frozenset({"shape", "size", "dtype", "device", "len", "ndim", "dim"})
_NORMALISING = frozenset({"softmax", "log_softmax", "normalize"})
_FINDING = frozenset({"where", "nonzero"})
_OF_ZEROS = frozenset({
    "mul", "imul", "mul_", "and_", "iand", "logical_and", "bitwise_and", "any", "sum", "div", "truediv", "bool", *CASTS,
})  # fmt: skip
_WRITING = frozenset({"index_add", "index_add_", "setitem", "index_put", "index_put_", "index_copy", "index_copy_"})
_ADDING = frozenset({"add", "iadd", "add_", "sub", "isub", "sub_"})


@dataclass(slots=True, eq=False)
class ExpertNodes:
    """The nodes that work for one expert alone, in the order of the graph.

    `through` maps each of them that adds to a value of other nodes to that value. `leak` is a node that uses a value of
    the branch in another way; if there is none, the branch can be left out.
    """

    nodes: dict[fx.Node, None] = field(default_factory=dict)
    through: dict[fx.Node, fx.Node] = field(default_factory=dict)
    leak: fx.Node | None = None


Kinds = dict[fx.Node, tuple[int, str]]  # the expert of a value, and `ROWS` or `ZERO`


def branches_of(graph: fx.GraphModule, told: Mapping[fx.Node, int]) -> dict[int, ExpertNodes]:
    """The branch of each expert; `told` are the nodes that tell its rows from others, and the expert of each."""
    found: dict[int, ExpertNodes] = {expert: ExpertNodes() for expert in told.values()}
    kinds: Kinds = {}
    for node in graph.graph.nodes if told else ():
        if node in told:
            kinds[node] = told[node], ZERO
            found[told[node]].nodes[node] = None
        elif experts := {kinds[source][0] for source in node.all_input_nodes if source in kinds}:
            _enter(graph, node, [found[expert] for expert in sorted(experts)], kinds)
    _with_own_sources(graph, found)
    return found


def _enter(graph: fx.GraphModule, node: fx.Node, branches: Sequence[ExpertNodes], kinds: Kinds) -> None:
    """Enter a node into the branch that an input of it is in, or mark it as a leak of all such branches."""
    branch, alone = branches[0], len(branches) == 1
    kind = _kind(graph, node, kinds) if alone else None
    kept = _passed(node, kinds) if alone and kind is None else None
    if kind is not None:
        kinds[node] = next(kinds[source][0] for source in node.all_input_nodes if source in kinds), kind
    elif kept is not None:
        branch.through[node] = kept
    else:
        for each in branches:
            each.leak = each.leak or node
        return
    branch.nodes[node] = None


def _kind(graph: fx.GraphModule, node: fx.Node, kinds: Kinds) -> str | None:
    """`ROWS` or `ZERO`: the value of a node without the expert of some of its inputs; None where it is neither."""
    name, first = name_of(node), node.args[0] if node.args else None
    rule = RULES.get(key_of(node, graph)) if node.op.startswith("call") else None
    home = getattr(rule, "__module__", getattr(getattr(rule, "func", None), "__module__", ""))
    kind = kinds[first][1] if isinstance(first, fx.Node) and first in kinds else None
    inside = {kinds[source][1] for source in node.all_input_nodes if source in kinds}
    if name in _FINDING and len(node.args) == 1:
        return ROWS
    if name in _QUESTIONS and kind is not None:
        return kind
    if node.target is operator.getitem and (kind is None or len(node.all_input_nodes) > 1):
        return ROWS  # by numbers or a mask
    if home == movement.__name__ and node.target is not operator.setitem and kind is not None:
        return kind
    by_row = node.op == "call_module" or home in _BY_ROW or name in _NORMALISING
    if inside == {ROWS} and name not in _WRITING and by_row:
        return ROWS
    if ROWS not in inside and name in _OF_ZEROS:
        return ZERO if kind is not None or name not in ("div", "truediv") else None
    return None


def _passed(node: fx.Node, kinds: Kinds) -> fx.Node | None:
    """The input whose value a node has, or leaves in place, without the expert; None where it does something else."""
    name, first = name_of(node), node.args[0] if node.args else None
    own = [source for source in node.all_input_nodes if source in kinds]
    others = [source for source in node.all_input_nodes if source not in kinds]
    if not isinstance(first, fx.Node):
        return None
    if name in _WRITING and first not in kinds:
        return first
    adds = name in _ADDING and len(node.all_input_nodes) == 2 and len(others) == 1 and not node.kwargs
    if adds and kinds[own[0]][1] == ZERO and (first is others[0] or name == "add"):
        return others[0]
    chooses = node.target in (torch.where, "where") and len(node.args) == 3 and own == [first]
    return node.args[2] if chooses and isinstance(node.args[2], fx.Node) else None


def _with_own_sources(graph: fx.GraphModule, branches: Mapping[int, ExpertNodes]) -> None:
    """Add to each branch the nodes that only it uses, such as parameters, and slices of stacked ones."""
    owner = {node: expert for expert, own in branches.items() for node in own.nodes if node not in own.through}
    for node in reversed(list(graph.graph.nodes)) if owner else ():
        users = {owner.get(user, -1) for user in node.users}
        if len(users) == 1 and min(users) >= 0 and node.op != "placeholder" and node not in owner:
            expert = users.pop()
            if node not in branches[expert].through:
                owner[node] = expert
                branches[expert].nodes[node] = None
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for own in branches.values():
        own.nodes = dict.fromkeys(sorted(own.nodes, key=order.__getitem__))
