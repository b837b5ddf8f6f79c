"""Numbers of the original: what a graph computes of sizes that were narrowed, as it was before."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.labels import Labels

if TYPE_CHECKING:
    from fxprune.mending import Repair

SHARE = "share_of_size_"  # prefix of the nodes that compute a share of a size
_COUNTS: tuple[Any, ...] = ("numel", "nelement", torch.numel)  # of all entries, whatever their axis


def original(repair: Repair, node: fx.Node, kinds: tuple[type, ...]) -> Any:
    """What stands for a number (or, of these kinds, a shape) that changed: a literal, or what gives it for any input.

    Sizes that the plan leaves alone, such as that of the batch, are still read from the input.
    """
    before, now = repair.old[node.name], repair.env[node]
    if not isinstance(before, kinds) or isinstance(before, bool) or before == now:
        return node
    if isinstance(before, tuple):
        pairs = enumerate(zip(before, now, strict=True))
        return tuple(_inserted(repair, operator.getitem, node, i) if old == new else old for i, (old, new) in pairs)
    if node.target in _COUNTS and isinstance(before, int):
        common = math.gcd(before, now)
        times = _inserted(repair, operator.mul, node, before // common)
        return _inserted(repair, operator.floordiv, times, now // common)
    if not _varies(repair, node):
        return before
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: original(repair, n, (int, float)))
    with repair.graph.graph.inserting_before(repair.node):
        return repair.graph.graph.create_node(node.op, node.target, args, kwargs, name=f"{SHARE}{node.name}")


def _inserted(repair: Repair, function: Any, *args: Any) -> fx.Node:
    with repair.graph.graph.inserting_before(repair.node):
        return repair.graph.graph.create_node("call_function", function, args, name=f"{SHARE}{repair.node.name}")


def _varies(repair: Repair, node: fx.Node) -> bool:
    """Whether a number that changed follows from sizes, too, that did not."""
    before = repair.old[node.name]
    if isinstance(before, Labels):
        return False
    if not isinstance(before, (int, float)) or _reads(repair, node):
        return node.target in _COUNTS or before == repair.env[node]
    return any(_varies(repair, source) for source in node.all_input_nodes)


def _reads(repair: Repair, node: fx.Node) -> bool:
    """Whether a node reads a number from a tensor, or from its shape."""
    return any(not isinstance(repair.old[source.name], (int, float)) for source in node.all_input_nodes)
