"""Rewriting: from a graph and the units to keep to a new graph with narrowed layers and mended literals."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxprune.caller.arrays import Flags
from fxprune.coupling.groups import Coupling
from fxprune.coupling.interpreter import named, step
from fxprune.errors import FxpruneError, RewriteError, error_text
from fxprune.rewriting import mending_sizes  # noqa: F401 - registers its ways of mending
from fxprune.rewriting.growth import Growth
from fxprune.rewriting.mending import mend, restore, restore_numbers, undo
from fxprune.rewriting.node_mending import Mending, is_inserted
from fxprune.rewriting.places import check_places
from fxprune.rewriting.remaining import Checker, MismatchError, narrowed_copy
from fxprune.rewriting.removed_branches import leave_out, removed_nodes
from fxprune.rules.resize import resize
from fxprune.rules.table import describe
from fxprune.tracing.graph import RECORD, ModelGraph

# Raised by operations, the model's assertions and the checks of labels where sizes do not fit: the node is mended.
MISFITS = (FxpruneError, RuntimeError, ValueError, IndexError, ArithmeticError, AssertionError)


def rewrite(graph: ModelGraph, coupling: Coupling, keep: Flags) -> ModelGraph:
    """A new graph without the units that are not in `keep`. It shares no storage with `graph`.

    Raises RewriteError where no literal and no gather gives a node the expected labels.
    """
    small: ModelGraph = narrowed_copy(graph, Checker(graph, coupling, keep))
    leave_out(small, coupling, keep)
    checker, growth = Checker(small, coupling, keep), Growth(graph, coupling.specs)
    for node in list(small.graph.nodes):
        checker.env[node] = _settle(checker, node, growth)
    small.graph.lint()
    small.recompile()
    small.meta.pop(RECORD, None)
    for node in small.graph.nodes:
        node.meta.clear()
    return small


def check_labels(small: ModelGraph, coupling: Coupling, keep: Flags, graph: ModelGraph) -> None:
    """Run the kept labels through a rewritten graph; at every node they must be the original's, narrowed, in order.

    Nodes are matched by their order; inserted nodes are skipped.

    Raises MismatchError at the first node where they differ.
    """
    checker = Checker(small, coupling, keep)
    known = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    known |= {node.name for node in graph.graph.nodes}
    own = [node for node in small.graph.nodes if not is_inserted(node, known)]
    gone = removed_nodes(graph, coupling, keep)
    kept = [node for node in graph.graph.nodes if node.name not in gone]
    if [_kind(node) for node in own] != [_kind(node) for node in kept]:
        raise MismatchError("the rewritten graph has other nodes than the original")
    for node, original in zip(own, kept, strict=True):
        try:
            _compute_inserted(checker, node, original)
            checker.env[node] = checker.checked(node, original)
        except MismatchError as error:
            error.node = original.name
            raise


def _kind(node: fx.Node) -> str:
    """A node's op; all calls are one kind, because rewriting may turn one into another."""
    return "call" if node.op.startswith("call") else node.op


def _settle(checker: Checker, node: fx.Node, growth: Growth) -> Any:
    """The checked value of a node, after resizing its module and mending its literals where necessary."""
    mending = Mending(
        checker.graph, node, checker.old, checker.env, checker.expected(node), checker.masks, growth.along
    )
    if node.op == "call_module":
        inputs = map_arg(node.args, checker.env.__getitem__)
        resize(checker.module(node), inputs[0] if inputs else None, mending.expected)
    elif node.op == "get_attr":
        resize(checker.graph.get_submodule(str(node.target).rpartition(".")[0]))
    restore_numbers(mending)
    given, errors, operation = (node.args, node.kwargs), list[Exception](), describe(mending.key)
    for change in (None, restore, mend):  # unchanged, with the original's numbers, or as another call
        try:
            if change is not None:
                undo(mending, *given)
                change(mending)
            _compute_inserted(checker, node, node)
            value = checker.checked(node, node)
            if change is not mend:
                check_places(mending, *given)
        except MISFITS as error:
            errors.append(error)
        except Exception as error:
            what = f"{'mending' if change is mend else 'the rule'} for {operation} fails on narrowed inputs"
            raise RewriteError(f"{what}, {named(node)} ({error_text(error)})") from error
        else:
            return value
    raise RewriteError(
        f"{node.format_node()} cannot be narrowed ({errors[0]}; after mending: {errors[-1]}): "
        "exclude the layers that feed it"
    ) from errors[-1]


def _compute_inserted(checker: Checker, node: fx.Node, original: fx.Node) -> None:
    """Compute the values of inserted nodes that `node` uses."""
    for source in node.all_input_nodes:
        if source not in checker.env:
            _compute_inserted(checker, source, original)
            checker.original = original
            checker.env[source] = step(checker, source)
