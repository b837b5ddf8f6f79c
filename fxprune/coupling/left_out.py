"""What a graph no longer needs once some sums are read without one of their terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import fx, nn

from fxprune.rules.movement import move
from fxprune.rules.table import RULES, key_of
from fxprune.rules.vocabulary import CASTS
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.in_place import works_in_place

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SAME = frozenset({nn.Identity, *_DROPOUTS, F.dropout, *CASTS}) - {"clone"}  # they may give their input itself

Roots = Mapping[fx.Node, fx.Node]


def roots_of(graph: ModelGraph) -> dict[fx.Node, fx.Node]:
    """Node -> the node that made the storage of its value."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        key = key_of(node, graph)
        aliases = key in _SAME or RULES.get(key) is move or works_in_place(node, graph)
        roots[node] = roots[inputs[0]] if inputs and aliases else node
    return roots


def changes_of(graph: ModelGraph, roots: Roots) -> dict[fx.Node, list[fx.Node]]:
    """Root -> the nodes that change its storage in place."""
    changes: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.all_input_nodes and works_in_place(node, graph):
            changes.setdefault(roots[node], []).append(node)
    return changes


def left_out(graph: ModelGraph, cut: Mapping[fx.Node, fx.Node], roots: Roots) -> dict[fx.Node, None]:
    """The nodes that nothing needs once each sum of `cut` is read without the term that it maps to, in order.

    A sum is among them where nothing reads it either. Nodes that lead to no output, such as checks of sizes, go with
    any of their inputs; a node that only writes into a tensor goes with that.
    """
    nodes = [node for node in reversed(graph.graph.nodes) if node.op not in ("placeholder", "output")]
    writing = {node for node in nodes if not node.users and works_in_place(node, graph)}
    silent: set[fx.Node] = set()
    for node in nodes:
        if node not in writing and silent.issuperset(node.users):
            silent.add(node)
    gone: dict[fx.Node, None] = {}

    def goes(node: fx.Node) -> bool:
        if node in writing:
            return roots[node] in gone
        if node in silent:
            return any(source in gone for source in node.all_input_nodes)
        readers = [u for u in node.users if u not in silent and not (u in writing and roots[u] is node)]
        return all(user in gone or cut.get(user) is node for user in readers or node.users)

    before = -1
    while len(gone) > before:
        before = len(gone)
        gone |= {node: None for node in nodes if node not in gone and goes(node)}
    return {node: None for node in graph.graph.nodes if node in gone}
