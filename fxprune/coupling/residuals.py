"""Residual branches: the parts f of sums x + f(x) that can be left out of a graph, so that the sum reads x alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.caller.tensors import attribute_at
from fxprune.coupling.left_out import Roots, changes_of, left_out, roots_of
from fxprune.tracing.dependence import name_of
from fxprune.tracing.graph import ModelGraph

_SUMS = frozenset({"add", "iadd", "add_", "__add__", "__radd__", "__iadd__"})
_NAMED = 3  # modules in the name of a branch; one of more is called by the module that holds them

Nodes = Mapping[fx.Node, None]
Changes = Mapping[fx.Node, list[fx.Node]]


@dataclass(frozen=True, slots=True, eq=False)
class ResidualNodes:
    """A sum `total`, its term `branch` that can be left out, and the other one, the `shortcut`, which stays.

    `nodes` are those that only the branch needs, in order. `blocked` says why the branch stays all the same, or is
    None.
    """

    total: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    nodes: Nodes
    blocked: str | None = None

    def paths(self) -> list[str]:
        """The modules that it calls, and the parameters that it reads, in order."""
        return list(dict.fromkeys(str(n.target) for n in self.nodes if n.op in ("call_module", "get_attr")))


def residuals_of(graph: ModelGraph) -> list[ResidualNodes]:
    """The residual branches of a graph that have weights, in the order of their sums.

    A term of a sum is a branch where the other one, or a term of that, goes into it: x + f(x). All that is computed on
    the way has to be read in the branch alone. Where both terms are computed from one value, as with a projected
    shortcut, the branch is the one with more layers that have weights.
    """
    roots = roots_of(graph)
    changes, found = changes_of(graph, roots), list[ResidualNodes]()
    for node in filter(_is_sum, graph.graph.nodes):
        one, other = node.args
        pairs = ((other, one), (one, other))
        own = next((r for pair in pairs if (r := _of_identity(graph, node, *pair, roots))), None)
        own = own or _of_projection(graph, node, roots)
        if own is not None and _weights(graph, own.nodes):
            found.append(_unless_writing(own, changes))
    return found


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of one shape and dtype, those of its value."""
    if name_of(node) not in _SUMS or not node.op.startswith("call") or len(node.args) != 2 or node.kwargs:
        return False
    specs = [arg.meta["spec"] for arg in node.args if isinstance(arg, fx.Node)]
    if len(specs) < 2 or node.args[0] is node.args[1]:
        return False
    kinds = {(spec.shape, spec.dtype) if isinstance(spec, TensorSpec) else None for spec in (*specs, node.meta["spec"])}
    return len(kinds) == 1 and None not in kinds and specs[0].dtype.is_floating_point


def _of_identity(
    graph: ModelGraph, total: fx.Node, branch: fx.Node, shortcut: fx.Node, roots: Roots
) -> ResidualNodes | None:
    """The branch of a sum whose other term, or a term of it, goes into the branch; None where that is not so."""
    before = _sources(branch)
    entry = next((term for term in _terms(shortcut) if term in before), None)
    if entry is None:
        return None
    nodes, inside = left_out(graph, {total: branch}, roots), {entry: None}
    for node in graph.graph.nodes:
        if (node in before or node is branch) and not inside.keys().isdisjoint(node.all_input_nodes):
            inside[node] = None
    del inside[entry]
    kept = [node for node in inside if node not in nodes]
    if not kept:
        return ResidualNodes(total, branch, shortcut, nodes)
    reader = next((user for node in kept for user in node.users if user not in inside and user not in nodes), kept[0])
    node = next(node for node in kept if reader in node.users or reader is node)
    blocked = f"a value inside it, {node.name}, is read elsewhere, by {reader.name}"
    return ResidualNodes(total, branch, shortcut, nodes | inside, blocked)


def _of_projection(graph: ModelGraph, total: fx.Node, roots: Roots) -> ResidualNodes | None:
    """The branch of a sum of which both terms are computed from one value; None where that is not so."""
    terms: Any = total.args
    one, other = (
        ResidualNodes(total, branch, shortcut, left_out(graph, {total: branch}, roots))
        for branch, shortcut in (terms, reversed(terms))
    )
    entries = [
        {source for node in each.nodes for source in node.all_input_nodes if _has_floats(source)} - set(each.nodes)
        for each in (one, other)
    ]
    counts = [len(_weights(graph, each.nodes)) for each in (one, other)]
    if entries[0] != entries[1] or len(entries[0]) != 1 or counts[0] == counts[1]:
        return None
    return one if counts[0] > counts[1] else other


def _unless_writing(own: ResidualNodes, changes: Changes) -> ResidualNodes:
    """A branch; blocked where it writes into a tensor that stays."""
    for root, writers in changes.items():
        inside = [node for node in writers if node in own.nodes]
        if root not in own.nodes and own.blocked is None and inside:
            return replace(own, blocked=f"{inside[0].name} in it writes into a tensor that stays")
    return own


def _weights(graph: ModelGraph, nodes: Iterable[fx.Node]) -> list[str]:
    """The layers with matrices that some nodes use, by their modules' paths, each once, in order."""
    found: dict[str, None] = {}
    for node in nodes:
        path = str(node.target)
        if node.op == "call_module":
            held: Iterable[Tensor] = graph.get_submodule(path).parameters()
        elif node.op == "get_attr" and isinstance(value := attribute_at(graph, path), nn.Parameter):
            path, held = path.rpartition(".")[0] or path, (value,)
        else:
            continue
        found |= {path: None} if any(tensor.ndim > 1 for tensor in held) else {}
    return list(found)


def _sources(node: fx.Node) -> dict[fx.Node, None]:
    """The nodes with floats from which the value of a node is computed, without itself."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found and _has_floats(source):
                found[source] = None
                waiting.append(source)
    return found


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and the terms of the sum that it is, of the sums that these are, and so on."""
    yield node
    for source in node.args if _is_sum(node) else ():
        yield from _terms(source)  # type: ignore[arg-type]


def _has_floats(node: fx.Node) -> bool:
    """Whether the value of a node is or holds a tensor of floats."""
    specs = (leaf for leaf in pytree.tree_leaves(node.meta["spec"]) if isinstance(leaf, TensorSpec))
    return any(spec.dtype.is_floating_point for spec in specs)


def named(graph: ModelGraph, found: Iterable[ResidualNodes]) -> dict[str, ResidualNodes]:
    """The branches by the names of their layers, as in "layer1.0.conv1+conv2" or "layers.0.self_attn"."""
    names: dict[str, ResidualNodes] = {}
    for own in found:
        name = _name_of(_weights(graph, own.nodes), own.paths())
        count = sum(other == name or other.startswith(f"{name}#") for other in names)
        names[f"{name}#{count + 1}" if count else name] = own
    return names


def _name_of(layers: list[str], paths: list[str]) -> str:
    """The name of a branch with these layers, among the modules and parameters at `paths`.

    >>> _name_of(["a.0.conv1", "a.0.conv2"], ["a.0.bn1"]), _name_of(["a.0.attn.q", "a.0.attn.proj"], ["a.0.norm"])
    ('a.0.conv1+conv2', 'a.0.attn')
    """
    common = _common(layers)
    rest = list(dict.fromkeys(path.split(".")[len(common)] for path in layers if len(path.split(".")) > len(common)))
    is_module = len(_common([*layers, *paths])) < len(common)
    return ".".join(
        [*common, *(["+".join(rest)] if rest and not (common and (is_module or len(rest) > _NAMED)) else [])]
    )


def _common(paths: Iterable[str]) -> list[str]:
    """The names with which all of some paths begin.

    >>> _common(["a.0.conv1", "a.0.conv2"])
    ['a', '0']
    """
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]


def blocks_of(graph: ModelGraph, found: Iterable[ResidualNodes]) -> dict[str, list[ResidualNodes]]:
    """The blocks, entries of an `nn.ModuleList`, of which nothing is left without their branches, and these."""
    modules, held = dict(graph.named_modules(remove_duplicate=False)), dict[str, list[ResidualNodes]]()
    for own in found:
        common = _common(own.paths())
        ends = [
            end for end in range(1, len(common) + 1) if type(modules.get(".".join(common[: end - 1]))) is nn.ModuleList
        ]
        if ends:
            held.setdefault(".".join(common[: ends[-1]]), []).append(own)
    return {path: branches for path, branches in held.items() if _is_whole(graph, path, branches)}


def _is_whole(graph: ModelGraph, path: str, branches: Iterable[ResidualNodes]) -> bool:
    """Whether nothing of a block is left without some branches."""
    cut = {own.total: own.branch for own in branches if own.blocked is None}
    gone = left_out(graph, cut, roots_of(graph))
    inside = (
        n for n in graph.graph.nodes if n.op in ("call_module", "get_attr") and f"{n.target}.".startswith(f"{path}.")
    )
    return all(node in gone for node in inside)
