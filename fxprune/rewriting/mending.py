"""Mending: new literals, or a gather by index, for nodes that name the sizes or places of channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg

from fxprune.errors import RewriteError
from fxprune.rewriting.node_mending import PERMUTE, SHARE, Mending
from fxprune.rewriting.original_sizes import original
from fxprune.rewriting.places import moves, trace
from fxprune.rules import recurrent
from fxprune.rules.context import labels_in
from fxprune.rules.labels import Labels
from fxprune.rules.table import RULES, Key, registers

Mend = Callable[[Mending], None]
MENDS: dict[Key, Mend] = {}
PRESERVES: dict[Key, Mend] = {}
FOLLOWS: dict[Key, Mend] = {}
mends = registers(MENDS)  # the way to mend nodes of these operations
preserves = registers(PRESERVES)  # updates numbers that labels do not show; other sizes are the original's
follows = registers(FOLLOWS)  # as `preserves`, but the operations use the narrowed sizes of their inputs


def preserve(mending: Mending) -> None:
    """Update the numbers of a call that labels do not show."""
    function = PRESERVES.get(mending.key) or FOLLOWS.get(mending.key)
    if function is not None:
        function(mending)


def mend(mending: Mending) -> None:
    """Change the node so that it gives the expected value.

    Raises RewriteError where no way to do so is known.
    """
    if mending.key in MENDS:
        MENDS[mending.key](mending)
    elif isinstance(mending.old.get(mending.source.name), Labels):
        gather(mending)
    else:  # a tensor that is created with a size has the original's
        restore(mending, (int, float, tuple))


def restore_numbers(mending: Mending) -> None:
    """Restore numbers that were read from sizes and go into arithmetic on tensors; update those of `preserves`.

    An operation without a rule gets all of the original's numbers.
    """
    computes = mending.key in RULES and mending.key not in FOLLOWS and not moves(mending)
    inputs = [mending.old[source.name] for source in mending.node.all_input_nodes]
    if mending.node.op.startswith("call") and mending.key not in RULES:
        if labels_in((inputs, mending.old[mending.node.name])):
            restore(mending, (int, float, tuple))
    elif computes and any(isinstance(value, Labels) for value in inputs):
        restore(mending)
    preserve(mending)


def restore(mending: Mending, kinds: tuple[type, ...] = (int, float)) -> None:
    """Replace the node's changed inputs of these kinds by the original's."""
    node = mending.node
    node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: original(mending, n, kinds))


def undo(mending: Mending, args: Any, kwargs: Any) -> None:
    """Give the node its former arguments, and erase the nodes that were inserted for others."""
    mending.node.args, mending.node.kwargs = args, kwargs
    node = mending.node.prev
    while node.name.startswith(SHARE) and not node.users:  # the last inserted one stands right in front
        node, unused = node.prev, node
        mending.env.pop(unused, None)
        mending.graph.graph.erase_node(unused)


@mends(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def initial_states(mending: Mending) -> None:
    """Initial states of zeros are left out: a layer starts with zeros of the right size by itself."""
    args, kwargs = mending.arguments()
    if not recurrent.is_zero(kwargs.get("hx", args[1:])):
        raise RewriteError(f"the initial states of {mending.node.target} are no zeros that could be left out")
    mending.become("call_module", mending.node.target, (mending.argument(0, "input"),))


@mends(operator.getitem, "__getitem__")
def getitem(mending: Mending) -> None:
    """The entry of an index that picks channels picks the kept ones, at their new places."""
    only = mending.node.args[1]
    if isinstance(only, int):  # of the first axis, whatever is narrowed beside it
        kept = mending.masks(mending.before)[0]
        if not bool(kept[only]):
            raise RewriteError("it selects a channel that is removed")
        place = int(kept[: only % len(kept)].sum())
        mending.become("call_function", operator.getitem, (mending.source, place))
        return
    axis, index = _places(mending)
    entries = mending.node.args[1] if isinstance(mending.node.args[1], tuple) else (mending.node.args[1],)
    explicit = sum(entry is not None and entry is not Ellipsis for entry in entries)
    spelled: list[Any] = []
    for entry in entries:
        spelled += [slice(None)] * (mending.before.ndim - explicit) if entry is Ellipsis else [entry]
    places = [place for place, entry in enumerate(spelled) if entry is not None]
    run = _run_of(index) if index.ndim else None
    spelled[places[axis]] = slice(*run) if run else mending.insert_index(index) if index.ndim else int(index)
    mending.become("call_function", operator.getitem, (mending.source, tuple(spelled)))


@mends(operator.setitem)
def setitem(mending: Mending) -> None:
    """As `getitem`; the assigned value is narrowed where it is computed."""
    value = mending.node.args[2]
    getitem(mending)
    mending.become("call_function", operator.setitem, (*mending.node.args, value))


def gather(mending: Mending) -> None:
    """Replace a data movement by a gather along the axis of channels, or insert a permutation before it."""
    axis, index = _places(mending)
    if not _moves_only(mending, axis):
        _permute_before(mending, axis, index)
    elif index.ndim == 0:
        mending.become("call_method", "select", (mending.source, axis, int(index)))
    elif run := _run_of(index):
        mending.become("call_method", "narrow", (mending.source, axis, run[0], run[1] - run[0]))
    else:
        mending.become("call_function", torch.index_select, (mending.source, axis, mending.insert_index(index)))


def _permute_before(mending: Mending, axis: int, index: Tensor) -> None:
    """Permute the channels so that the unchanged movement brings each to its place."""
    size = mending.now.shape[axis]
    _, moved = trace(mending, axis, mending.env.__getitem__)
    if sorted(moved.tolist()) != list(range(size)) or len(index) != size:
        raise RewriteError(f"{mending.node.format_node()} moves channels and positions in one step")
    order = torch.empty_like(index)
    order[moved] = index
    buffer = mending.insert_index(order, PERMUTE)
    with mending.graph.graph.inserting_before(mending.node):
        permuted = mending.graph.graph.call_function(torch.index_select, (mending.source, axis, buffer))
    mending.node.replace_input_with(mending.source, permuted)


def _places(mending: Mending) -> tuple[int, Tensor]:
    """The axis of channels, and for each kept channel of the result its place among the kept ones of the input."""
    kept = mending.masks(mending.before)
    narrowed = [axis for axis, mask in enumerate(kept) if not bool(mask.all())]
    if len(narrowed) != 1:
        raise RewriteError(f"{len(narrowed)} axes of its input are narrowed")
    axis = narrowed[0]
    if mending.grows(mending.source.name, axis):
        raise RewriteError(
            f"axis {axis} of {mending.source.name} holds more than channels, and no index fits all of its lengths"
        )
    out, origin = trace(mending, axis, lambda n: mending.old[n.name])
    if out is not None:
        origin = origin[mending.masks(mending.old[mending.node.name])[out]]
    if not bool(kept[axis][origin].all()):
        raise RewriteError("it selects a channel that is removed")
    return axis, (kept[axis].cumsum(0) - 1)[origin]


def _moves_only(mending: Mending, axis: int) -> bool:
    """Whether the node's operation changes no axis but `axis`."""
    shape = mending.before.shape
    others = (other for other in range(len(shape)) if other != axis and shape[other] > 1)
    return all(
        trace(mending, other, lambda n: mending.old[n.name])[1].tolist() == list(range(shape[other]))
        for other in others
    )


def _run_of(index: Tensor) -> tuple[int, int] | None:
    """The bounds of an index that is a run of consecutive numbers."""
    first = int(index[0]) if len(index) else 0
    return (first, first + len(index)) if index.tolist() == list(range(first, first + len(index))) else None
