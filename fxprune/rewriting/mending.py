"""Mending: new literals, or a gather by index, for nodes that name the sizes or places of channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg

from fxprune.errors import RewriteError
from fxprune.rewriting.original_sizes import original
from fxprune.rewriting.places import moves, trace
from fxprune.rewriting.repair import PERMUTE, SHARE, Repair, index_node
from fxprune.rules import recurrent
from fxprune.rules.labels import Labels
from fxprune.rules.table import RULES, Key, key_of

Mend = Callable[[Repair], None]
MENDS: dict[Key, Mend] = {}


def mends(*keys: Key) -> Callable[[Mend], Mend]:
    """Register the decorated function as the way to mend nodes of these operations."""

    def register(function: Mend) -> Mend:
        MENDS.update(dict.fromkeys(keys, function))
        return function

    return register


PRESERVES: dict[Key, Mend] = {}
FOLLOWS: set[Key] = set()


def preserves(*keys: Key, follows: bool = False) -> Callable[[Mend], Mend]:
    """Register the decorated function, which brings numbers up to date that labels do not show.

    What `follows` takes sizes of what it reads as they are now; for any other, they stay the original's.
    """

    def register(function: Mend) -> Mend:
        PRESERVES.update(dict.fromkeys(keys, function))
        FOLLOWS.update(keys if follows else ())
        return function

    return register


def preserve(repair: Repair) -> None:
    """Bring the numbers of a call up to date that labels do not show."""
    key = key_of(repair.node, repair.graph) if repair.node.op.startswith("call") else ""
    if key in PRESERVES:
        PRESERVES[key](repair)


def mend(repair: Repair) -> None:
    """Change the node so that it gives what it should.

    Raises RewriteError where nothing is known that would.
    """
    key = key_of(repair.node, repair.graph)
    if key in MENDS:
        MENDS[key](repair)
    elif isinstance(repair.old.get(repair.source.name), Labels):
        gather(repair)
    else:
        creation(repair)


def restore_numbers(repair: Repair) -> None:
    """A number that was read from a size and goes into arithmetic on tensors stays the original's."""
    node = repair.node
    key = key_of(node, repair.graph) if node.op.startswith("call") else ""
    computes = key in RULES and key not in FOLLOWS and not moves(repair)
    if computes and any(isinstance(repair.old[n.name], Labels) for n in node.all_input_nodes):
        restore(repair)
    preserve(repair)


def restore(repair: Repair, kinds: tuple[type, ...] = (int, float)) -> None:
    """Replace the inputs of the node that are of these kinds, and changed, by the original's."""
    node = repair.node
    node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: original(repair, n, kinds))


def undo(repair: Repair, args: Any, kwargs: Any) -> None:
    """Give the node the arguments back that it had, and erase what was inserted for others."""
    repair.node.args, repair.node.kwargs = args, kwargs
    node = repair.node.prev
    while node.name.startswith(SHARE) and not node.users:  # the last inserted one stands right in front
        node, unused = node.prev, node
        repair.env.pop(unused, None)
        repair.graph.graph.erase_node(unused)


@mends("new_zeros", "new_ones", "new_empty", "new_full")
def creation(repair: Repair) -> None:
    """A tensor that is made of a size has the original's size."""
    restore(repair, (int, float, tuple))


@mends(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def initial_states(repair: Repair) -> None:
    """Initial states of zeros are left out: zeros of the right size are what the layer starts with by itself."""
    args, kwargs = repair.arguments()
    if not recurrent.is_zero(kwargs.get("hx", args[1:])):
        raise RewriteError(f"the initial states of {repair.node.target} are no zeros that could be left out")
    given = repair.node.args[0] if repair.node.args else repair.node.kwargs["input"]
    repair.become("call_module", repair.node.target, (given,))


@mends(operator.getitem, "__getitem__")
def getitem(repair: Repair) -> None:
    """The entry of an index that picks channels picks those that stay, at their new places."""
    axis, index = _places(repair)
    entries = repair.node.args[1] if isinstance(repair.node.args[1], tuple) else (repair.node.args[1],)
    rank = repair.old[repair.source.name].ndim
    explicit = sum(entry is not None and entry is not Ellipsis for entry in entries)
    spelled: list[Any] = []
    for entry in entries:
        spelled += [slice(None)] * (rank - explicit) if entry is Ellipsis else [entry]
    places = [place for place, entry in enumerate(spelled) if entry is not None]
    spelled[places[axis]] = _as_entry(repair, index)
    repair.become("call_function", operator.getitem, (repair.source, tuple(spelled)))


@mends(operator.setitem)
def setitem(repair: Repair) -> None:
    """As an index that picks; what is assigned is narrowed where it was made."""
    value = repair.node.args[2]
    getitem(repair)
    repair.become("call_function", operator.setitem, (*repair.node.args, value))


def _as_entry(repair: Repair, index: Tensor) -> Any:
    """An index of channels as a number, a slice where they are consecutive, or a buffer."""
    if index.ndim == 0:
        return int(index)
    run = _run_of(index)
    return slice(*run) if run else index_node(repair, index)


def gather(repair: Repair) -> None:
    """Replace a data movement by a gather along the axis of channels, or put one before it that makes it right."""
    axis, index = _places(repair)
    if not _moves_only(repair, axis):
        _permute_before(repair, axis, index)
    elif index.ndim == 0:
        repair.become("call_method", "select", (repair.source, axis, int(index)))
    elif run := _run_of(index):
        repair.become("call_method", "narrow", (repair.source, axis, run[0], run[1] - run[0]))
    else:
        repair.become("call_function", torch.index_select, (repair.source, axis, index_node(repair, index)))


def _permute_before(repair: Repair, axis: int, index: Tensor) -> None:
    """Permute the channels so that the movement, as it stands, brings each to the place where it belongs."""
    size = repair.env[repair.source].shape[axis]
    _, moved = trace(repair, axis, repair.env.__getitem__)
    if sorted(moved.tolist()) != list(range(size)) or len(index) != size:
        raise RewriteError(f"{repair.node.format_node()} moves channels and positions in one step")
    order = torch.empty_like(index)
    order[moved] = index
    graph = repair.graph.graph
    buffer = index_node(repair, order, f"{PERMUTE}{repair.node.name}")
    with graph.inserting_before(repair.node):
        permuted = graph.call_function(torch.index_select, (repair.source, axis, buffer))
    repair.node.replace_input_with(repair.source, permuted)


def _places(repair: Repair) -> tuple[int, Tensor]:
    """The axis of channels, and for each channel of the result that stays its place among those that stay."""
    before = repair.old[repair.source.name]
    stays = repair.masks(before)
    narrowed = [axis for axis, mask in enumerate(stays) if not bool(mask.all())]
    if len(narrowed) != 1:
        raise RewriteError(f"{len(narrowed)} axes of its input are narrowed")
    axis = narrowed[0]
    if repair.grows(repair.source.name, axis):
        raise RewriteError(
            f"axis {axis} of {repair.source.name} holds more than channels, and no index fits all of its lengths"
        )
    out, origin = trace(repair, axis, lambda n: repair.old[n.name])
    if out is not None:
        origin = origin[repair.masks(repair.old[repair.node.name])[out]]
    if not bool(stays[axis][origin].all()):
        raise RewriteError("it takes out a channel that goes")
    return axis, (stays[axis].cumsum(0) - 1)[origin]


def _moves_only(repair: Repair, axis: int) -> bool:
    """Whether the node's operation leaves every axis but `axis` as it is."""
    before = repair.old[repair.source.name]
    for other in range(before.ndim):
        if other != axis and before.shape[other] > 1:
            _, moved = trace(repair, other, lambda n: repair.old[n.name])
            if moved.tolist() != list(range(before.shape[other])):
                return False
    return True


def _run_of(index: Tensor) -> tuple[int, int] | None:
    """The bounds of an index that is a run of consecutive numbers."""
    first = int(index[0]) if len(index) else 0
    return (first, first + len(index)) if index.tolist() == list(range(first, first + len(index))) else None
