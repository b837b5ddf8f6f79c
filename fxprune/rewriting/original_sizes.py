"""Numbers of the original: what a graph computes of sizes that were narrowed, as it was before."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxprune.rewriting.repair import SHARE, Repair
from fxprune.rules.labels import Labels


def original(repair: Repair, node: fx.Node, kinds: tuple[type, ...]) -> Any:
    """What stands for a number (or, of these kinds, a shape) that changed: what gives the original's for any input.

    A size is in fixed proportion to what it was; what is computed of sizes is computed of those of the original.
    """
    before, now = repair.old[node.name], repair.env[node]
    stays = isinstance(before, bool) or not isinstance(before, kinds)
    if stays or before == now:
        return node
    if _is_read(repair, node) and not isinstance(before, float):
        return sizes(repair, node, before) if isinstance(before, tuple) else share(repair, node, now, before)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: original(repair, n, (int, float, tuple)))
    return inserted(repair, node.target, *args, op=node.op, **kwargs)


def sized(repair: Repair, size: Any, want: int) -> Any:
    """What gives `want` on the example in the place of a size, and follows the input wherever that does."""
    if not isinstance(size, fx.Node):
        return want
    now = repair.env[size]
    before = repair.old.get(size.name, now)
    if before == now or _is_read(repair, size):
        return share(repair, size, now, want)
    return share(repair, original(repair, size, (int,)), before, want)


def sizes(repair: Repair, shape: fx.Node, wanted: Sequence[int]) -> tuple[Any, ...]:
    """The entries of a shape that a node gives, each in proportion to what is wanted; -1 stays."""
    found = enumerate(zip(repair.env[shape], wanted, strict=True))
    return tuple(
        -1 if now == -1 else share(repair, inserted(repair, operator.getitem, shape, place), now, want)
        for place, (now, want) in found
    )


def share(repair: Repair, size: fx.Node, now: int, want: int) -> Any:
    """The share of a size that is `want` where the size is `now`."""
    if now <= 0:
        return want
    common = math.gcd(now, want)
    for function, number in ((operator.mul, want // common), (operator.floordiv, now // common)):
        if number != 1:
            size = inserted(repair, function, size, number)
    return size


def inserted(repair: Repair, target: Any, *args: Any, op: str = "call_function", **kwargs: Any) -> fx.Node:
    """A node before the one that is mended."""
    graph = repair.graph.graph
    with graph.inserting_before(repair.node):
        return graph.create_node(op, target, args, kwargs, name=f"{SHARE}{repair.node.name}")


def _is_read(repair: Repair, node: fx.Node) -> bool:
    """Whether a node reads a size from a tensor or from a shape: it is in proportion to what it was."""
    sources = (repair.old[source.name] for source in node.all_input_nodes)
    return node.target is operator.getitem or node.op == "call_method" or any(isinstance(v, Labels) for v in sources)
