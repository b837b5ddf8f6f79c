"""Mending: new literals, or a gather by index, for nodes that name the sizes or places of channels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import RewriteError
from fxprune.labels import Labels, varying_axes
from fxprune.rules import movement, recurrent
from fxprune.rules.table import RULES, Key, key_of

INDEX = "_fxprune_index_"  # prefix of the buffers that hold gathering indices; they are not part of the state_dict
PERMUTE = f"{INDEX}before_"  # of those that permute channels in front of a movement
SHARE = "share_of_size_"  # prefix of the nodes that compute a share of a size


@dataclass(frozen=True, slots=True)
class Repair:
    """A node to mend: values of the original graph by node name, new values by node, the value that it should get.

    `masks` tells for a value of the original graph which indices of each axis stay.
    """

    graph: fx.GraphModule
    node: Any  # a torch.fx.Node; its arguments are anything
    old: Mapping[str, Any]
    env: dict[fx.Node, Any]
    expected: Any
    masks: Callable[[Labels], list[Tensor]]

    @property
    def source(self) -> fx.Node:
        """The first input node."""
        source: fx.Node = self.node.all_input_nodes[0]
        return source

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The node's arguments with the original's numbers and labels in the place of nodes."""
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda n: self.old[n.name])
        return args, kwargs

    def become(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Turn the node into another one under the same name."""
        self.node.op, self.node.target = op, target
        self.node.args, self.node.kwargs = args, kwargs or {}


Mend = Callable[[Repair], None]
MENDS: dict[Key, Mend] = {}


def mends(*keys: Key) -> Callable[[Mend], Mend]:
    """Register the decorated function as the way to mend nodes of these operations."""

    def register(function: Mend) -> Mend:
        MENDS.update(dict.fromkeys(keys, function))
        return function

    return register


PRESERVES: dict[Key, Mend] = {}


def preserves(*keys: Key) -> Callable[[Mend], Mend]:
    """Register the decorated function, which brings numbers up to date that labels do not show."""

    def register(function: Mend) -> Mend:
        PRESERVES.update(dict.fromkeys(keys, function))
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
    preserve(repair)
    rule = RULES.get(key_of(node, repair.graph)) if node.op.startswith("call") else None
    follows = rule is None or rule.__module__ == movement.__name__
    if not follows and any(isinstance(repair.old[n.name], Labels) for n in node.all_input_nodes):
        _restore(node, repair)


def _restore(node: fx.Node, repair: Repair, kinds: tuple[type, ...] = (int, float)) -> None:
    """Replace the inputs that are of these kinds, and changed, by the original's."""

    def original(n: fx.Node) -> Any:
        before, now = repair.old[n.name], repair.env[n]
        is_number = isinstance(before, kinds) and not isinstance(before, bool)
        return before if is_number and before != now else n

    node.args, node.kwargs = map_arg((node.args, node.kwargs), original)


@preserves(F.scaled_dot_product_attention)
def scale(repair: Repair) -> None:
    """The scale follows from the size of a head in the original."""
    before = repair.old[repair.source.name].shape[-1]
    if repair.node.kwargs.get("scale") is None and repair.env[repair.source].shape[-1] != before:
        repair.node.kwargs = dict(repair.node.kwargs) | {"scale": before**-0.5}


@preserves(torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full)
def number_as_tensor(repair: Repair) -> None:
    """A number that was read from a size and becomes a tensor stays the original's."""
    _restore(repair.node, repair)


@preserves(F.group_norm, torch.group_norm)
def groups_of_norm(repair: Repair) -> None:
    """Groups keep their size, where there are several."""
    now, before = repair.env[repair.source].shape[1], repair.old[repair.source.name].shape[1]
    count = repair.node.kwargs.get("num_groups", repair.node.args[1] if len(repair.node.args) > 1 else 1)
    if now != before and count != 1:
        _set_argument(repair, 1, "num_groups", now // (before // count))


@preserves(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def normalized_shape(repair: Repair) -> None:
    """The last axes of the input."""
    node, now = repair.node, repair.env[repair.source].shape
    named = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ())
    if now != repair.old[repair.source.name].shape and isinstance(named, (tuple, list)):
        _set_argument(repair, 1, "normalized_shape", tuple(now[len(now) - len(named) :]))


def _set_argument(repair: Repair, place: int, name: str, value: Any) -> None:
    """Give the node another argument, by position or by name, as it had it."""
    node = repair.node
    if name in node.kwargs:
        node.kwargs = dict(node.kwargs) | {name: value}
    else:
        node.update_arg(place, value)


@mends("view_as", "reshape_as", "expand_as")
def shape_of_another(repair: Repair) -> None:
    """The other tensor, whose shape is taken, is cut to the shape that is wanted."""
    node, other = repair.node, repair.node.args[1]
    sizes, wanted = repair.env[other].shape, repair.expected.shape
    for axis, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
        if size != want:
            buffer = _index_node(repair, torch.arange(want) % size, f"{PERMUTE}{node.name}")
            with repair.graph.graph.inserting_before(node):
                other = repair.graph.graph.call_function(torch.index_select, (other, axis, buffer))
    node.args = (node.args[0], other)


@mends("view", "reshape", torch.reshape, "expand", "broadcast_to", torch.broadcast_to)
def shape_literals(repair: Repair) -> None:
    """Sizes that do not hold become those that do; -1 and those read from another tensor stay."""
    node = repair.node
    sizes = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    flat = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    now = [repair.env[size] if isinstance(size, fx.Node) else size for size in flat]
    if len(now) == 1 and isinstance(flat[0], fx.Node) and _sum_literals(repair, flat[0]):
        return
    if len(now) == 1 and isinstance(now[0], tuple):
        now = list(now[0])
        flat = now
    wanted = repair.expected.shape
    mended = [
        old if value in (-1, want) else _in_proportion(repair, old, value, want)
        for old, value, want in zip(flat, now, wanted, strict=True)
    ]
    repair.become(
        node.op,
        node.target,
        (node.args[0], tuple(mended)) if node.op == "call_function" else (node.args[0], *mended),
    )


def _in_proportion(repair: Repair, size: Any, value: int, want: int) -> Any:
    """A size that was computed (batch times heads, say) becomes a share of it, so that it follows the input's."""
    if not isinstance(size, fx.Node) or value <= 0:
        return want
    graph, common = repair.graph.graph, math.gcd(value, want)
    with graph.inserting_before(repair.node):
        for function, number in ((operator.mul, want // common), (operator.floordiv, value // common)):
            if number != 1:
                size = graph.create_node("call_function", function, (size, number), name=f"{SHARE}{repair.node.name}")
    return size


def _sum_literals(repair: Repair, size: fx.Node) -> bool:
    """Mend the literals of a shape that is another tensor's, with some put before or behind; whether that is enough."""
    if size.target is not operator.add or len(size.users) > 1:
        return False
    parts: list[Any] = []
    found: list[int] = []
    for part in cast("tuple[Any, ...]", size.args):
        sizes = repair.env[part] if isinstance(part, fx.Node) else part
        wanted = repair.expected.shape[len(found) : len(found) + len(sizes)]
        literal = tuple(old if old == -1 else want for old, want in zip(sizes, wanted, strict=True))
        parts.append(part if isinstance(part, fx.Node) else literal)
        found += sizes if isinstance(part, fx.Node) else literal
    if any(have not in (-1, want) for have, want in zip(found, repair.expected.shape, strict=True)):
        return False
    size.args = tuple(parts)
    repair.env[size] = torch.Size(found) if min(found) >= 0 else tuple(found)
    return True


@mends("new_zeros", "new_ones", "new_empty", "new_full")
def creation(repair: Repair) -> None:
    """A tensor that is made of a size has the original's size."""
    _restore(repair.node, repair, (int, float, tuple))


@mends("unflatten", torch.unflatten, nn.Unflatten)
def unflatten(repair: Repair) -> None:
    """The sizes that the axis is split into."""
    before, after = repair.old[repair.source.name].shape, repair.expected.shape
    rank = len(after) - len(before) + 1
    if repair.node.op == "call_module":
        dim: Any = repair.graph.get_submodule(str(repair.node.target)).dim
    else:
        dim = repair.node.kwargs.get("dim", repair.node.args[1] if len(repair.node.args) > 1 else 0)
    dim = int(dim) % len(before)
    repair.become("call_method", "unflatten", (repair.source, dim, tuple(after[dim : dim + rank])))


@mends("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split)
def split_sizes(repair: Repair) -> None:
    """Whatever way a tensor was split, the pieces get the sizes that they should have."""
    args, kwargs = repair.arguments()
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    sizes = [piece.shape[dim] for piece in repair.expected]
    repair.become("call_function", torch.split, (repair.source, sizes, dim))


@mends(F.pad, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def pad_amounts(repair: Repair) -> None:
    """Padding channels that went are padded no more."""
    args, kwargs = repair.arguments()
    _, amounts, mode = movement.pad_arguments(repair.graph, repair.node, args, kwargs)
    stays = repair.masks(repair.old[repair.node.name])
    flat: list[int] = []
    for dim, (before, after) in amounts.items():
        kept_after = int(stays[dim][len(stays[dim]) - after :].sum()) if after > 0 else after
        flat += [int(stays[dim][:before].sum()) if before > 0 else before, kept_after]
    if repair.node.op == "call_module":
        value = getattr(repair.graph.get_submodule(str(repair.node.target)), "value", 0.0)
    else:
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
    repair.become("call_function", F.pad, (repair.source, flat, mode, value))


@mends(torch._assert)
def assertion(repair: Repair) -> None:
    """What the model asserts of the number of channels held for the original."""
    repair.become("call_function", torch._assert, (True, *repair.node.args[1:]))


@mends(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def group_count(repair: Repair) -> None:
    """A functional convolution names its number of groups."""
    node = repair.node
    transposed = "transpose" in str(getattr(node.target, "__name__", ""))
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight = repair.env[given["input"]], repair.env[given["weight"]]
    axis = x.ndim - (weight.ndim - 2) - 1
    channels = repair.expected.shape[axis] if transposed else x.shape[axis]
    repair.become("call_function", node.target, (), given | {"groups": channels // weight.shape[1]})


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
    return slice(*run) if run else _index_node(repair, index)


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
        repair.become("call_function", torch.index_select, (repair.source, axis, _index_node(repair, index)))


def _permute_before(repair: Repair, axis: int, index: Tensor) -> None:
    """Permute the channels so that the movement, as it stands, brings each to the place where it belongs."""
    size = repair.env[repair.source].shape[axis]
    _, moved = _trace(repair, axis, repair.env[repair.source].shape, lambda n: repair.env[n])
    if sorted(moved.tolist()) != list(range(size)) or len(index) != size:
        raise RewriteError(f"{repair.node.format_node()} moves channels and positions in one step")
    order = torch.empty_like(index)
    order[moved] = index
    graph = repair.graph.graph
    buffer = _index_node(repair, order, f"{PERMUTE}{repair.node.name}")
    with graph.inserting_before(repair.node):
        permuted = graph.call_function(torch.index_select, (repair.source, axis, buffer))
    repair.node.replace_input_with(repair.source, permuted)


def is_inserted(node: fx.Node, known: Collection[str]) -> bool:
    """Whether mending put this node in: a gathering index, a permutation in front of a movement, a share of a size.

    `known` are the names of the nodes and tensors that the graph had before.
    """
    if node.name.startswith(SHARE):
        return node.name not in known
    holders = [node] if node.op == "get_attr" else [n for n in node.all_input_nodes if n.op == "get_attr"]
    prefix = INDEX if node.op == "get_attr" else PERMUTE
    return any(str(holder.target).startswith(prefix) and holder.target not in known for holder in holders)


def _places(repair: Repair) -> tuple[int, Tensor]:
    """The axis of channels, and for each channel of the result that stays its place among those that stay."""
    before = repair.old[repair.source.name]
    stays = repair.masks(before)
    narrowed = [axis for axis, mask in enumerate(stays) if not bool(mask.all())]
    if len(narrowed) != 1:
        raise RewriteError(f"{len(narrowed)} axes of its input are narrowed")
    axis = narrowed[0]
    out, origin = _trace(repair, axis, before.shape, lambda n: repair.old[n.name])
    if out is not None:
        origin = origin[repair.masks(repair.old[repair.node.name])[out]]
    if not bool(stays[axis][origin].all()):
        raise RewriteError("it takes out a channel that goes")
    return axis, (stays[axis].cumsum(0) - 1)[origin]


def _trace(
    repair: Repair, axis: int, shape: Sequence[int], value: Callable[[fx.Node], Any]
) -> tuple[int | None, Tensor]:
    """Where along `axis` each index of the result comes from: the node's operation, run on the places themselves.

    Returns the axis of the result that `axis` becomes, or None where one index of it is taken out, and the places.
    """
    size = [1] * len(shape)
    size[axis] = shape[axis]
    places = torch.arange(shape[axis], dtype=torch.float64).reshape(size).expand(tuple(shape))
    given = repair.node.args[:2] if repair.node.target is operator.setitem else repair.node.args
    args, kwargs = map_arg((given, repair.node.kwargs), value)
    x = value(repair.source)
    args, kwargs = pytree.tree_map_only(Labels, lambda v: places if v is x else v.value.cpu(), (args, kwargs))
    result = movement.call(repair.node, repair.graph, args, kwargs)
    axes = varying_axes(result)
    if len(axes) > 1 or not isinstance(result, Tensor):
        raise RewriteError("it spreads the channels over several axes")
    out = axes[0] if axes else axis if result.ndim == len(shape) else None
    for dim in reversed(range(result.ndim)):
        if dim != out:
            result = result.select(dim, 0)
    return out, result.long()


def _moves_only(repair: Repair, axis: int) -> bool:
    """Whether the node's operation leaves every axis but `axis` as it is."""
    before = repair.old[repair.source.name]
    for other in range(before.ndim):
        if other != axis and before.shape[other] > 1:
            _, moved = _trace(repair, other, before.shape, lambda n: repair.old[n.name])
            if moved.tolist() != list(range(before.shape[other])):
                return False
    return True


def _run_of(index: Tensor) -> tuple[int, int] | None:
    """The bounds of an index that is a run of consecutive numbers."""
    first = int(index[0])
    return (first, first + len(index)) if index.tolist() == list(range(first, first + len(index))) else None


def _index_node(repair: Repair, index: Tensor, name: str = "") -> fx.Node:
    """A node that gives `index`, kept as a buffer outside the state_dict."""
    name = name or f"{INDEX}{repair.node.name}"
    while hasattr(repair.graph, name):
        name += "_"
    device = next((t.device for t in (*repair.graph.parameters(), *repair.graph.buffers())), torch.device("cpu"))
    repair.graph.register_buffer(name, index.to(device), persistent=False)
    with repair.graph.graph.inserting_before(repair.node):
        return repair.graph.graph.get_attr(name)
