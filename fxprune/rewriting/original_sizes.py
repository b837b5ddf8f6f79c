"""Numbers of the original, computed in a rewritten graph from sizes that were narrowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxprune.rewriting.node_mending import Mending
from fxprune.rules.context import labels_in
from fxprune.rules.labels import Labels


def original(mending: Mending, node: fx.Node, kinds: tuple[type, ...]) -> Any:
    """The node; if its value, of these `kinds` (numbers, shapes), changed, one that gives the original's for any input.

    A size is in fixed proportion to the original's; a number computed from sizes is computed from the original's sizes.
    """
    if node.name not in mending.old:  # it was inserted for the original's number
        return node
    before, now = mending.old[node.name], mending.env[node]
    is_number = type(before) is not bool and any(isinstance(before, kind) for kind in kinds)
    if not is_number or labels_in(before) or before == now:
        return node
    if _is_read(mending, node) and not isinstance(before, float):
        return sizes(mending, node, before) if isinstance(before, tuple) else share(mending, node, now, before)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: original(mending, n, (int, float, tuple)))
    return mending.insert(node.target, *args, op=node.op, **kwargs)


def sized(mending: Mending, size: Any, want: int) -> Any:
    """A replacement for a size that is `want` on the example, and depends on the input where the size does."""
    if not isinstance(size, fx.Node):
        return want
    now = mending.env[size]
    before = mending.old.get(size.name, now)
    if before == now or _is_read(mending, size):
        return share(mending, size, now, want)
    return share(mending, original(mending, size, (int,)), before, want)


def sizes(mending: Mending, shape: fx.Node, wanted: Sequence[int]) -> tuple[Any, ...]:
    """The entries of a node's shape, each scaled to the wanted one; -1 is kept."""
    found = enumerate(zip(mending.env[shape], wanted, strict=True))
    return tuple(
        -1 if now == -1 else share(mending, mending.insert(operator.getitem, shape, place), now, want)
        for place, (now, want) in found
    )


def share(mending: Mending, size: fx.Node, now: int, want: int) -> Any:
    """A size scaled so that it is `want` where the size is `now`."""
    if now <= 0:
        return want
    common = math.gcd(now, want)
    for function, number in ((operator.mul, want // common), (operator.floordiv, now // common)):
        if number != 1:
            size = mending.insert(function, size, number)
    return size


def _is_read(mending: Mending, node: fx.Node) -> bool:
    """Whether a node reads a size from a tensor or a shape, so that it is in proportion to the original's."""
    sources = (mending.old[source.name] for source in node.all_input_nodes)
    return node.target is operator.getitem or node.op == "call_method" or any(isinstance(v, Labels) for v in sources)
