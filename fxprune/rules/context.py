"""The context of a rule: the statements that rules make to the pass that collects ties and to the one that checks."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.caller.tensors import all_tensors, attribute_at, first_names
from fxprune.rules.arguments import Call
from fxprune.rules.labels import NO_CHANNEL, Labels, Plane, core_of, has_channels, slices, vector_plane
from fxprune.rules.vocabulary import CASTS, FILLS, INDEX_SELECT, LIKES, ChannelRead, Comparison, Meeting, Option, Slot

_MATRIX = 2  # axes of a weight; with fewer than one more, a lookup gives vectors, as of words
LARGEST_GRID = 1 << 20  # labels of a product of channels with others
Test = Callable[[fx.Node], bool]


class Context(ABC):
    """The state of one pass over a graph: the current node, the values so far, and the statements of rules."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(graph.graph.nodes))
        self.call = Call("", (), {})  # of the current node
        self.owners = first_names(all_tensors(graph))
        self.query_heads = False  # single heads of queries are removed, the same of each group that shares keys
        self.by_heads = True  # whole heads of an attention grid are removed; otherwise the same places of every head
        self._dynamic = _that_follow(graph, lambda node: node.op == "placeholder" or node.target in FILLS)
        self._touching = _that_follow(graph, partial(_brings_channels, graph), unless=_only_asks)

    # -- what the two passes do differently ------------------------------------------------------------------------

    @abstractmethod
    def tie(self, a: Tensor, b: Tensor) -> None:
        """Say that the labels a and b, broadcast against each other, are kept or removed together.

        Where one of the two is no channel, the other has to be kept.
        """

    @abstractmethod
    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say that these labels have to be kept."""

    @abstractmethod
    def choose(self, options: Sequence[Option], *, ordered: bool = False) -> None:
        """Say that one of these options must hold, chosen once all ties are known.

        Chosen is the one that leaves most units free, or if `ordered`, the first that leaves at least two.
        """

    @abstractmethod
    def produce(self, labels: Tensor, site: str) -> None:
        """Say that the layer `site` computes these channels."""

    @abstractmethod
    def balance(self, *sites: str) -> None:
        """Say that these sites keep the same number of channels each."""

    @abstractmethod
    def outnumber(self, site: str, other: str) -> None:
        """Say that `site` keeps more channels than `other`."""

    @abstractmethod
    def edge(self, reading: ChannelRead) -> None:
        """Say that the current node reads channels: an edge."""

    @abstractmethod
    def compare(self, comparison: Comparison) -> None:
        """Say that the current node compares channels, which are kept unless they are experts."""

    def attend(self, labels: Tensor) -> None:  # noqa: B027 - only coupling asks
        """Say that the current node multiplies activations with each other, over axes that have these channels."""

    @abstractmethod
    def choose_by_number(self, labels: Tensor) -> None:
        """Say that these are experts: a row reads nothing of the experts that it has not chosen."""

    @abstractmethod
    def tell_apart(self, expert: Tensor) -> None:
        """Say that the current node's value is nonzero only for rows that have chosen this expert, one label."""

    @abstractmethod
    def take_out(self, label: Tensor, reason: str) -> None:
        """Say that the current node takes a single channel out of an axis: it is kept, unless it is an expert's."""

    @abstractmethod
    def mark_numbers(self, labels: Tensor, experts: Tensor) -> None:
        """Say that each of these labels is where a row is marked that has chosen the expert beside it."""

    @abstractmethod
    def fresh(self, slot: Slot, size: int) -> Tensor:
        """The labels of a slot: new ones when it is first mentioned."""

    @abstractmethod
    def remember(self, what: str, value: int) -> int:
        """The value of `what` for the current node in the original graph; `value` may be narrower."""

    @abstractmethod
    def is_given_up(self) -> bool:
        """Whether the current node, although it has a rule, is handled as one without a rule."""

    @abstractmethod
    def slot_axes(self, owner: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of the parameter `owner` that carry labels."""

    @abstractmethod
    def axes_of(self, tensor: Tensor, output: int, plane: int) -> tuple[int, ...]:
        """The axes along which plane `plane` of output `output` of the current node varies."""

    # -- reading values --------------------------------------------------------------------------------------------

    def spec(self, node: fx.Node | None = None) -> Any:
        """The specs of what a node (by default the current one) gave on the example, before narrowing."""
        return (node or self.node).meta["spec"]

    def vector(self, x: Labels, dim: int) -> Tensor:
        """The labels along axis `dim`; those in one slice across it are tied."""
        planes = x.along(dim)
        if len(planes) > 1:
            for plane in planes:
                self.freeze(plane.core, "one axis mixes the channels of two others")
        if len(planes) != 1:
            return torch.full((x.shape[dim],), NO_CHANNEL, dtype=torch.float64)
        rows = planes[0].slices(dim)
        if rows.shape[1] > 1:
            self.tie(rows[:, :1], rows)
        return rows[:, 0]

    def source(self, x: Labels) -> fx.Node | None:
        """The input of the current node whose value is `x`."""
        return next((node for node in self.node.all_input_nodes if self.env.get(node) is x), None)

    def is_constant(self, x: Labels) -> bool:
        """Whether `x`, an argument of the current node, depends on no input of the model."""
        source = self.source(x)
        return source is None or not self.is_live(source.name)

    def is_live(self, name: str) -> bool:
        """Whether the value of a node depends on an input of the model."""
        return name in self._dynamic

    def touches_channels(self) -> bool:
        """Whether an input of the current node has channels: labels that are not those of a constant."""
        sources = (source for source in self.node.all_input_nodes if source.name in self._touching)
        return any(x.planes for source in sources for x in labels_in(self.env[source]))

    def consume(self, x: Labels, dim: int) -> Tensor:
        """The labels along axis `dim`, which the current node reads as its input channels."""
        labels = self.vector(x, dim)
        self.read(x, dim, labels)
        return labels

    def read(
        self, x: Labels, dim: int, labels: Tensor, *, through: Tensor | None = None, across: Tensor | None = None
    ) -> None:
        """Say that the current node reads `labels` along axis `dim` of `x`: the edge that is gated."""
        source = self.source(x)
        if source is not None and has_channels(labels):
            self.edge(ChannelRead(self.node.name, source.name, dim, labels, through, across))

    def recur(self, parameter: str, labels: Tensor) -> None:
        """Say that the current module reads its own units `labels` through axis 1 of its parameter `parameter`."""
        if has_channels(labels):
            self.edge(ChannelRead(self.node.name, self.node.name, 1, labels, parameter=parameter))

    def parameter(self, name: str) -> Labels | None:
        """The parameter or buffer `name` with a plane for each axis, or None where the module has none."""
        tensor = attribute_at(self.graph, name)
        if not isinstance(tensor, Tensor):
            return None
        shape, owner = tuple(tensor.shape), self.owners.get(name)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return Labels(shape, value=tensor.detach())
        axes = () if owner is None else self.slot_axes(owner, shape)  # without an owner it is computed from others
        fresh = ((self.fresh(Slot(str(owner), axis), shape[axis]), axis) for axis in axes)
        return Labels(shape, tuple(vector_plane(labels, axis, tensor.ndim) for labels, axis in fresh))

    def own(self, name: str) -> Labels | None:
        """The parameter or buffer `name` of the current module."""
        return self.parameter(f"{self.node.target}.{name}")

    def site(self, *parameters: Labels | None) -> str:
        """The name of the current layer: its module's path, or that of the raw parameter that it uses."""
        if self.node.op == "call_module":
            return str(self.node.target)
        for node in self.node.all_input_nodes:
            source = node
            while source.target in CASTS or _is_lookup(source):
                source = source.all_input_nodes[0]
            if source.op == "get_attr" and any(self.env[node] is parameter for parameter in parameters):
                return str(source.target).removesuffix(".weight")
        return self.node.name

    def is_looked_up(self, x: Labels) -> bool:
        """Whether `x`, an argument of the current node, is a weight of several: each row of the input picks its own."""
        node = self.source(x)
        while node is not None and (node.target in CASTS or _is_lookup(node)):
            node = node.all_input_nodes[0]
            if not self.is_live(node.name):
                return len(self.spec(node).shape) > _MATRIX
        return False

    # -- building values -------------------------------------------------------------------------------------------

    def opaque(self, reason: str, *values: Any) -> Any:
        """Freeze every label in `values`; the node's own value carries none."""
        for x in labels_in(values):
            for core in (*(plane.core for plane in x.planes), *(() if x.index_of is None else (x.index_of,))):
                self.freeze(core, reason)
        return pytree.tree_map_only(TensorSpec, lambda spec: Labels(spec.shape), self.spec())

    def freeze_numbered(self, values: Any) -> None:
        """Freeze the experts that numbers among `values` choose: the current node does more than look up by these."""
        for x in labels_in(values):
            if x.index_of is not None:
                self.freeze(x.index_of, f"told apart by number in {self.describe()}")

    def meet(self, inputs: Sequence[Labels], shape: Sequence[int]) -> Labels:
        """The value of an element-wise op of broadcast shape `shape`: labels that meet are tied."""
        ndim = len(shape)
        aligned = [[plane.shifted(ndim - x.ndim) for plane in x.planes] for x in inputs]
        sizes = [(1,) * (ndim - x.ndim) + tuple(x.shape) for x in inputs]
        merged = (self.merge(Meeting(axes, aligned, sizes)) for axes in clusters(aligned))
        return Labels(tuple(shape), tuple(plane for plane in merged if plane is not None))

    def merge(self, meeting: Meeting) -> Plane | None:
        """The plane that the planes of a meeting become over its axes, or None where no axis is left.

        Planes over the same axes are tied. Where planes of one axis meet a grid, whole slices of the grid are removed
        along one axis, with the channels of the planes along it; other planes are kept.
        """
        cores = {plane.axes: plane for plane in meeting.planes}
        for plane in meeting.planes:
            if plane is not cores[plane.axes]:
                self.tie(cores[plane.axes].core, plane.core)
        if meeting.axes not in cores:  # the labels of the result are those of a grid that no input has
            size = math.prod(meeting.grid.values())
            meeting = replace(meeting, coarse=bool(self.remember(f"coarse{meeting.axes}", int(size > LARGEST_GRID))))
        result = self._merged_plane(meeting)
        known = any(result is plane for plane in meeting.planes)
        planes = [*cores.values(), *([] if result is None or known else [result])]
        options = [_slices_option(planes, axis) for axis in meeting.order() if meeting.may_be_removed(axis)]
        if not options:
            for plane in meeting.planes:
                self.freeze(plane.core, f"meets values without channels in {self.describe()}")
            return None
        if len(meeting.axes) > 1:
            self.choose(options, ordered=meeting.by_heads is not None)
        return result

    def _merged_plane(self, meeting: Meeting) -> Plane | None:
        """The plane over the result's axes: the widest of the meeting, or fresh labels where a sum removed an axis."""
        axes = meeting.result_axes()
        whole = [plane for plane in meeting.planes if plane.axes == axes == meeting.axes]
        if whole or not axes:
            return max(whole, key=lambda plane: plane.core.numel(), default=None)
        shape = [meeting.grid[axis] if axis in axes else 1 for axis in range(meeting.planes[0].core.ndim)]
        slot = Slot(self.node.name, f"{meeting.tag}{'.'.join(map(str, axes))}")
        return Plane(self.fresh(slot, math.prod(shape)).reshape(shape), axes)

    def statistic(self, x: Labels, dims: Iterable[int]) -> Labels:
        """A value after a statistic over the axes `dims`: labels along these are kept, or removed inexactly if asked.

        Of a grid with further axes, whole slices along those may be removed.
        """
        dims = set(dims)
        for plane in x.planes:
            rest = tuple(axis for axis in plane.axes if axis not in dims)
            if not rest:
                self.inexact(x, plane, f"{self.describe()} takes a statistic over the channels")
            elif len(rest) < len(plane.axes):
                self.tie(core_of(plane.core, rest), plane.core)
        return Labels(x.shape, x.planes)

    def inexact(self, x: Labels, plane: Plane, reason: str) -> None:
        """Say that the value of the current node changes when channels of `plane` are removed: they are kept."""
        self.freeze(plane.core, reason)

    def settle(
        self, tensors: Sequence[Tensor], shape: Sequence[int], output: int = 0, *, ragged: Sequence[bool] = ()
    ) -> Labels:
        """The value of a data-movement op, from its results on the label tensors of each plane.

        `ragged` says for each plane whether its slices along the last axis keep channels of their own.
        """
        planes, single = [], []
        for index, tensor in enumerate(tensors):
            axes = self.axes_of(tensor, output, index)
            core = core_of(tensor, axes)
            if not axes:
                self.take_out(core.reshape(-1)[:1], f"a single channel is taken out by {self.describe()}")
                single.append(float(core.reshape(-1)[0]))
                continue
            apart = len(axes) > 1 and any(ragged[index : index + 1])
            if len(axes) > 1 and not apart:
                self.choose(grid_options(core, axes))
            planes.append(Plane(core, axes, apart))
        return Labels(tuple(shape), tuple(planes), single=tuple(single))

    def describe(self) -> str:
        """The current node, for a message or a reason."""
        target = self.node.target
        if self.node.op == "call_module":
            return f"{type(self.module()).__name__} {target}"
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return f"{name} (node {self.node.name})"

    def module(self, node: fx.Node | None = None) -> nn.Module:
        """The module that a node (by default the current one) calls."""
        return self.graph.get_submodule(str((node or self.node).target))


def _that_follow(graph: fx.GraphModule, is_first: Test, unless: Test = lambda node: False) -> set[str]:
    """The names of some nodes, and of all that depend on them, but for those that `unless` names."""
    found: set[str] = set()
    for node in graph.graph.nodes:
        if is_first(node) or (not unless(node) and any(source.name in found for source in node.all_input_nodes)):
            found.add(node.name)
    return found


def _brings_channels(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives values of the model's input, or of its layers and weights."""
    is_weight = node.op == "get_attr" and isinstance(attribute_at(graph, str(node.target)), nn.Parameter)
    return node.op in ("placeholder", "call_module") or is_weight


def _is_lookup(node: fx.Node) -> bool:
    """Whether a node picks slices out of a tensor by one number, or by computed ones."""
    by_item = node.target in (operator.getitem, "__getitem__") and isinstance(node.args[1], int | fx.Node)
    return by_item or node.target == "index_select" or node.target in INDEX_SELECT


def _only_asks(node: fx.Node) -> bool:
    """Whether a node takes no more than sizes of its inputs."""
    name = node.args[1] if node.target is getattr else node.target
    return name in FILLS | LIKES or name in ("shape", "size", "numel", "dim", len)


def grid_options(core: Tensor, axes: Iterable[int]) -> list[Option]:
    """The ways to narrow a grid of labels: by whole slices along one of its axes."""
    return [Option(((rows[:, :1], rows),)) for rows in (slices(core, axis) for axis in axes)]


def labels_in(values: Any) -> list[Labels]:
    """Every `Labels` in nested arguments, in order."""
    if isinstance(values, Labels):
        return [values]
    if type(values) in (tuple, list):  # pytree takes ten times as long
        return [labels for value in values for labels in labels_in(value)]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Labels)]


def _slices_option(planes: Sequence[Plane], axis: int) -> Option:
    """The option to remove whole slices along `axis` of every plane that has it, and keep the other planes."""
    mine = [plane.slices(axis) for plane in planes if axis in plane.axes]
    others = tuple(plane.core.reshape(-1) for plane in planes if axis not in plane.axes)
    return Option(tuple((mine[0][:, :1], each) for each in mine), others)


def clusters(inputs: Sequence[Sequence[Plane]]) -> list[tuple[int, ...]]:
    """The sets of axes of all planes, united where they overlap, in order of their first axis."""
    found: list[set[int]] = []
    for plane in (plane for planes in inputs for plane in planes):
        axes = set(plane.axes)
        for other in [cluster for cluster in found if cluster & axes]:
            axes |= other
            found.remove(other)
        found.append(axes)
    return sorted(tuple(sorted(axes)) for axes in found)
