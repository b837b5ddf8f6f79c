"""Branches of removed experts, which a rewritten graph leaves out with their layers; numbers of the kept ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from fxprune.caller.arrays import Flags
from fxprune.coupling.groups import Branch, Coupling
from fxprune.errors import RewriteError
from fxprune.rewriting.mending import mends, preserves
from fxprune.rewriting.node_mending import Mending
from fxprune.rules.choices import EQUAL
from fxprune.rules.labels import Labels
from fxprune.tracing.graph import ModelGraph


def removed_branches(coupling: Coupling, keep: Flags) -> list[Branch]:
    """The branches of experts that are not kept."""
    return [branch for branch in coupling.branches if branch.expert >= 0 and not keep[branch.expert]]


def removed_nodes(coupling: Coupling, keep: Flags) -> set[str]:
    """The names of the nodes that work for removed experts alone."""
    return {name for branch in removed_branches(coupling, keep) for name in branch.nodes}


def compared_without(coupling: Coupling, keep: Flags) -> list[str]:
    """The nodes that compare experts, of which a removed one has a branch of its own."""
    removed = [branch.expert for branch in removed_branches(coupling, keep)]
    return [edge.consumer for edge in coupling.edges if edge.compared and np.isin(edge.units, removed).any()]


def leave_out(small: ModelGraph, coupling: Coupling, keep: Flags) -> None:
    """Remove the branches of removed experts, and the layers and parameters that only these use, from a graph."""
    by_name = {node.name: node for node in small.graph.nodes}
    used: dict[str, None] = {}
    through = {name: other for branch in removed_branches(coupling, keep) for name, other in branch.through.items()}
    for branch in removed_branches(coupling, keep):
        for name in (name for name in branch.nodes if name in through):
            other = through[name]
            while other in through:  # of another removed expert
                other = through[other]
            by_name[name].replace_all_uses_with(by_name[other])
        for name in reversed(branch.nodes):
            node = by_name[name]
            used |= {str(node.target): None} if node.op in ("call_module", "get_attr") else {}
            small.graph.erase_node(node)
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
