"""Rewriting: from a graph and the units that stay to a new graph with narrowed layers and mended literals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx
from torch.fx.node import map_arg

from fxprune.coupling.groups import Coupling
from fxprune.coupling.interpreter import step
from fxprune.errors import RewriteError
from fxprune.rewriting import mending_sizes as literals  # noqa: F401 - registers its ways of mending
from fxprune.rewriting.growth import Growth
from fxprune.rewriting.mending import mend, restore, restore_numbers, undo
from fxprune.rewriting.places import check_places
from fxprune.rewriting.remaining import Checker, MismatchError, narrowed_copy
from fxprune.rewriting.repair import Repair, is_inserted
from fxprune.rules.resize import resize
from fxprune.tracing.graph import CAPTURED, ModelGraph


def rewrite(graph: ModelGraph, coupling: Coupling, keep: NDArray[np.bool_]) -> ModelGraph:
    """A new graph in which the units without `keep` are gone. It shares no storage with `graph`.

    Raises RewriteError where no literal and no gather makes a node's labels hold.
    """
    small: ModelGraph = narrowed_copy(graph, Checker(graph, coupling, keep))
    checker, growth = Checker(small, coupling, keep), Growth(graph, coupling.specs)
    for node in list(small.graph.nodes):
        checker.env[node] = _settle(checker, node, growth)
    small.graph.lint()
    small.recompile()
    small.meta.pop(CAPTURED, None)
    for node in small.graph.nodes:
        node.meta.clear()
    return small


def check_labels(small: ModelGraph, coupling: Coupling, keep: NDArray[np.bool_], graph: ModelGraph) -> None:
    """Run the labels that stay through a rewritten graph; at every node they must be the old ones, narrowed, in order.

    Nodes are matched by their order; gathering indices that rewriting put in are passed over.

    Raises MismatchError at the first node where they are not.
    """
    checker = Checker(small, coupling, keep)
    known = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    known |= {node.name for node in graph.graph.nodes}
    own = [node for node in small.graph.nodes if not is_inserted(node, known)]
    if [_kind(node) for node in own] != [_kind(node) for node in graph.graph.nodes]:
        raise MismatchError("the rewritten graph has other nodes than the original")
    for node, original in zip(own, graph.graph.nodes, strict=True):
        _see_inserted(checker, node, original)
        checker.env[node] = checker.checked(node, original)


def _kind(node: fx.Node) -> str:
    """What rewriting leaves of a node's op: a call stays a call."""
    return "call" if node.op.startswith("call") else node.op


def _settle(checker: Checker, node: fx.Node, growth: Growth) -> Any:
    """The checked value of a node, after resizing its module and mending its literals where that is needed."""
    repair = Repair(checker.graph, node, checker.old, checker.env, checker.expected(node), checker.masks, growth.along)
    if node.op == "call_module":
        inputs = map_arg(node.args, checker.env.__getitem__)
        resize(checker.module(node), inputs[0] if inputs else None, repair.expected)
    elif node.op == "get_attr":
        resize(checker.graph.get_submodule(str(node.target).rpartition(".")[0]))
    restore_numbers(repair)
    given, errors = (node.args, node.kwargs), list[Exception]()
    for change in (None, restore, mend):  # as it stands, with the original's numbers, and in other words
        try:
            if change is not None:
                undo(repair, *given)
                change(repair)
            _see_inserted(checker, node, node)
            value = checker.checked(node, node)
            if change is not mend:
                check_places(repair, *given)
        except Exception as error:  # noqa: BLE001 - whatever an op says of sizes that do not fit asks for mending
            errors.append(error)
        else:
            return value
    raise RewriteError(
        f"{node.format_node()} cannot be narrowed ({errors[0]}; after mending: {errors[-1]}): "
        "exclude the layers that feed it"
    ) from errors[-1]


def _see_inserted(checker: Checker, node: fx.Node, original: fx.Node) -> None:
    """Put the values of nodes that mending inserted before `original`, and that `node` reads, into the checker."""
    for source in node.all_input_nodes:
        if source not in checker.env:
            _see_inserted(checker, source, original)
            checker.original = original
            checker.env[source] = step(checker, source)
