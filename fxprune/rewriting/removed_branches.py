"""Removed branches, of experts and residual ones, which a rewritten graph leaves out; numbers of the kept experts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from fxprune.caller.arrays import Flags
from fxprune.coupling.groups import Branch, Coupling, Residual
from fxprune.coupling.left_out import changes_of, left_out, roots_of
from fxprune.errors import RewriteError
from fxprune.rewriting.mending import mends, preserves
from fxprune.rewriting.node_mending import Mending
from fxprune.rules.choices import EQUAL
from fxprune.rules.labels import Labels
from fxprune.tracing.graph import ModelGraph


def removed_branches(coupling: Coupling, keep: Flags) -> list[Branch]:
    """The branches of experts that are not kept."""
    return [branch for branch in coupling.branches if branch.expert >= 0 and not keep[branch.expert]]


def removed_residuals(coupling: Coupling, keep: Flags) -> list[Residual]:
    """The residual branches that are not kept."""
    return [residual for residual in coupling.residuals if residual.unit >= 0 and not keep[residual.unit]]


def removed_nodes(graph: ModelGraph, coupling: Coupling, keep: Flags) -> dict[str, str | None]:
    """The names of the nodes that a rewritten graph lacks, and of those in whose place others are read, these.

    A sum that is changed in place later stays, as a copy of its shortcut.
    """
    by_name = {node.name: node for node in graph.graph.nodes}
    found: dict[str, str | None] = {}
    for branch in removed_branches(coupling, keep):
        found |= {name: branch.through.get(name) for name in branch.nodes}
    removed = {by_name[own.total]: own for own in removed_residuals(coupling, keep)}
    if removed:
        cut, roots = {total: by_name[own.branch] for total, own in removed.items()}, roots_of(graph)
        found |= {node.name: None for node in left_out(graph, cut, roots)}
        changes, place = changes_of(graph, roots), {node: index for index, node in enumerate(graph.graph.nodes)}
        for total, own in removed.items():
            shortcut: Any = total.args[own.place]
            written = any(place[node] > place[total] for node in changes.get(roots[total], ()))
            if total.name in found or not written or roots[shortcut] is roots[total]:
                found[total.name] = shortcut.name
    return found


def compared_without(coupling: Coupling, keep: Flags) -> list[str]:
    """The nodes that compare experts, of which a removed one has a branch of its own."""
    removed = [branch.expert for branch in removed_branches(coupling, keep)]
    return [edge.consumer for edge in coupling.edges if edge.compared and np.isin(edge.units, removed).any()]


def leave_out(small: ModelGraph, coupling: Coupling, keep: Flags) -> None:
    """Remove the branches that are not kept, and the layers and parameters that only these use, from a graph."""
    by_name = {node.name: node for node in small.graph.nodes}
    removed = removed_nodes(small, coupling, keep)
    used: dict[str, None] = {}
    for own in removed_residuals(coupling, keep):
        if own.total not in removed:
            node = by_name[own.total]
            node.op, node.target, node.args = "call_method", "clone", (node.args[own.place],)
    for name, instead in removed.items():
        while removed.get(str(instead)) is not None:
            instead = removed[str(instead)]  # noqa: PLW2901 - the one in the place of that
        if instead is not None:
            by_name[name].replace_all_uses_with(by_name[instead])
    for name, node in reversed(by_name.items()):
        if name in removed:
            used |= {str(node.target): None} if node.op in ("call_module", "get_attr") else {}
            small.graph.erase_node(node)
    _remove_unused(small, used)


def _remove_unused(small: ModelGraph, used: Collection[str]) -> None:
    """Remove the modules and tensors at some paths that no node names any more, and the modules that held them."""
    left = {str(node.target) for node in small.graph.nodes if node.op in ("call_module", "get_attr")}
    for path in used:
        while path and not any(other == path or other.startswith(f"{path}.") for other in left):
            owner, _, name = path.rpartition(".")
            held = getattr(small.get_submodule(owner), name, None)
            if isinstance(held, nn.Module) and path not in used and any(True for _ in held.parameters()):
                break  # it holds what no node names
            if held is not None:
                delattr(small.get_submodule(owner), name)
            path = owner  # noqa: PLW2901 - the modules that held it, as far as nothing else is in them


@preserves(*EQUAL)
def number_of_expert(mending: Mending) -> None:
    """A number that is compared with those of experts is the kept expert's new one."""
    node, source = mending.node, mending.node.all_input_nodes[0]
    before, now = mending.old.get(source.name), mending.env.get(source)
    if not isinstance(before, Labels) or before.index_of is None or not isinstance(now, Labels) or now.index_of is None:
        return
    given: Any = node.args[1]
    if isinstance(given, fx.Node):
        given = int(mending.old[given.name].value)
    places = (now.index_of == before.index_of[given]).nonzero().flatten().tolist()
    if not places:
        raise RewriteError(f"{node.format_node()} tells a removed expert apart")
    node.args = (node.args[0], places[0])


@mends(F.one_hot)
def number_of_experts(mending: Mending) -> None:
    """As many places as experts are kept."""
    mending.become("call_function", F.one_hot, (mending.node.args[0], mending.expected.shape[-1]))
