"""What a rule can say: the vocabulary shared by the pass that collects ties and the pass that checks them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.arguments import Call
from fxprune.rules.labels import NO_CHANNEL, Labels, Plane, core_of, vector_plane
from fxprune.rules.vocabulary import Meeting, Option, Reading, Slot


class Context(ABC):
    """The state of one walk over a graph: the node at hand, the values so far, and what rules may say of them."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(graph.graph.nodes))
        self.call = Call("", (), {})  # what the node at hand asks its rule
        self._dynamic = _depend_on_inputs(graph)
        self.owners = owners_of(graph)
        self.by_heads = True  # of an attention grid, whole heads go; otherwise the same places of every head

    # -- what the two passes do differently ------------------------------------------------------------------------

    @abstractmethod
    def tie(self, a: Tensor, b: Tensor) -> None:
        """Say that the labels a and b, broadcast against each other, live or die together.

        Where only one of the two is a label, that one has to stay: the other side cannot be narrowed there.
        """

    @abstractmethod
    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say that these labels have to stay."""

    @abstractmethod
    def choose(self, options: Sequence[Option], *, ordered: bool = False) -> None:
        """Say that one of these options must hold; which one is chosen once all ties are known.

        The one that leaves most units free, or where they are `ordered`, the first that leaves two.
        """

    @abstractmethod
    def produce(self, labels: Tensor, site: str) -> None:
        """Say that the layer `site` computes these channels."""

    @abstractmethod
    def balance(self, *sites: str) -> None:
        """Say that these sites keep the same number of channels each, whichever."""

    @abstractmethod
    def outnumber(self, site: str, other: str) -> None:
        """Say that `site` keeps more channels than `other`."""

    @abstractmethod
    def edge(self, reading: Reading) -> None:
        """Say that the node at hand reads channels: an edge."""

    @abstractmethod
    def fresh(self, slot: Slot, size: int) -> Tensor:
        """The labels of a slot: new ones at its first mention."""

    @abstractmethod
    def remember(self, what: str, value: int) -> int:
        """What `value` was for the node at hand in the original graph; now it may be narrower."""

    @abstractmethod
    def slot_axes(self, owner: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of the parameter `owner` that carry labels."""

    @abstractmethod
    def axes_of(self, tensor: Tensor, output: int, plane: int) -> tuple[int, ...]:
        """The axes along which plane `plane` of output `output` of the node at hand varies."""

    # -- reading values --------------------------------------------------------------------------------------------

    def spec(self, node: fx.Node | None = None) -> Any:
        """What the node (the one at hand by default) gave on the example, before any narrowing."""
        return (node or self.node).meta["spec"]

    def vector(self, x: Labels, dim: int) -> Tensor:
        """The labels along axis `dim`; whatever lies in one slice across it is tied."""
        planes = x.along(dim)
        if len(planes) > 1:
            for plane in planes:
                self.freeze(plane.core, "one axis mixes the channels of two others")
        if len(planes) != 1:
            return torch.full((x.shape[dim],), NO_CHANNEL, dtype=torch.float64)
        slices = planes[0].core.movedim(dim, 0).reshape(x.shape[dim], -1)
        if slices.shape[1] > 1:
            self.tie(slices[:, :1], slices)
        return slices[:, 0]

    def source(self, x: Labels) -> fx.Node | None:
        """The input node of the node at hand that gave `x`."""
        return next((node for node in self.node.all_input_nodes if self.env.get(node) is x), None)

    def is_constant(self, x: Labels) -> bool:
        """Whether `x`, an argument of the node at hand, depends on no input of the model."""
        source = self.source(x)
        return source is None or not self.is_live(source.name)

    def is_live(self, name: str) -> bool:
        """Whether what a node gives depends on an input of the model."""
        return name in self._dynamic

    def consume(self, x: Labels, dim: int) -> Tensor:
        """The labels along axis `dim`, which the node at hand reads as its input channels."""
        labels = self.vector(x, dim)
        self.read(x, dim, labels)
        return labels

    def read(
        self, x: Labels, dim: int, labels: Tensor, *, through: Tensor | None = None, across: Tensor | None = None
    ) -> None:
        """Say that the node at hand reads `labels` along axis `dim` of `x`: the edge that is gated."""
        source = self.source(x)
        if source is not None and bool((labels != NO_CHANNEL).any()):
            self.edge(Reading(self.node.name, source.name, dim, labels, through, across))

    def recur(self, parameter: str, labels: Tensor) -> None:
        """Say that the module at hand reads its own units `labels` through axis 1 of its parameter `parameter`."""
        if bool((labels != NO_CHANNEL).any()):
            self.edge(Reading(self.node.name, self.node.name, 1, labels, parameter=parameter))

    def parameter(self, name: str) -> Labels | None:
        """The parameter or buffer `name` with a plane for each axis, or None where the module has none."""
        tensor = _get_tensor(self.graph, name)
        if tensor is None:
            return None
        if not tensor.is_floating_point():
            return Labels(tuple(tensor.shape), value=tensor.detach())
        owner = self.owners.get(name)
        if owner is None:  # computed from others, by a parametrization for example
            return Labels(tuple(tensor.shape))
        planes = tuple(
            vector_plane(self.fresh(Slot(owner, axis), tensor.shape[axis]), axis, tensor.ndim)
            for axis in self.slot_axes(owner, tensor.shape)
        )
        return Labels(tuple(tensor.shape), planes)

    def own(self, name: str) -> Labels | None:
        """The parameter or buffer `name` of the module at hand."""
        return self.parameter(f"{self.node.target}.{name}")

    def site(self, *parameters: Labels | None) -> str:
        """The name of the layer at hand: its module's path, or that of the raw parameter that it works with."""
        if self.node.op == "call_module":
            return str(self.node.target)
        for node in self.node.all_input_nodes:
            if node.op == "get_attr" and any(self.env[node] is parameter for parameter in parameters):
                return str(node.target).removesuffix(".weight")
        return self.node.name

    # -- building values -------------------------------------------------------------------------------------------

    def opaque(self, reason: str, *values: Any) -> Any:
        """Freeze every label in `values`; the node's own value carries none."""
        for x in labels_in(values):
            for plane in x.planes:
                self.freeze(plane.core, reason)
        return pytree.tree_map_only(TensorSpec, lambda spec: Labels(spec.shape), self.spec())

    def meet(self, inputs: Sequence[Labels], shape: Sequence[int]) -> Labels:
        """The value of an element-wise op of broadcast shape `shape`: labels that meet are tied."""
        ndim = len(shape)
        aligned = [[plane.shifted(ndim - x.ndim) for plane in x.planes] for x in inputs]
        sizes = [(1,) * (ndim - x.ndim) + tuple(x.shape) for x in inputs]
        merged = (self.merge(Meeting(axes, aligned, sizes)) for axes in clusters(aligned))
        return Labels(tuple(shape), tuple(plane for plane in merged if plane is not None))

    def merge(self, meeting: Meeting) -> Plane | None:
        """The one plane that the planes of a meeting become over its axes, or None where none is left.

        Planes over the same axes are tied. Where planes of one axis meet a grid, whole slices of the grid go, along
        one axis: those planes go with them, or stay.
        """
        cores = {plane.axes: plane for plane in meeting.planes}
        for plane in meeting.planes:
            if plane is not cores[plane.axes]:
                self.tie(cores[plane.axes].core, plane.core)
        result = self._merged_plane(meeting)
        known = any(result is plane for plane in meeting.planes)
        planes = [*cores.values(), *([] if result is None or known else [result])]
        options = [_slices_go(planes, axis) for axis in meeting.order() if meeting.may_go(axis)]
        if not options:
            for plane in meeting.planes:
                self.freeze(plane.core, f"meets values without channels in {self.describe()}")
            return None
        if len(meeting.axes) > 1:
            self.choose(options, ordered=meeting.by_heads is not None)
        return result

    def _merged_plane(self, meeting: Meeting) -> Plane | None:
        """The plane over those axes of a meeting that are left: the widest, or fresh labels where a sum took a part."""
        axes = meeting.left()
        whole = [plane for plane in meeting.planes if plane.axes == axes == meeting.axes]
        if whole or not axes:
            return max(whole, key=lambda plane: plane.core.numel(), default=None)
        sizes = [max(plane.core.shape[axis] for plane in meeting.planes) for axis in axes]
        shape = [1] * meeting.planes[0].core.ndim
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        slot = Slot(self.node.name, f"{meeting.tag}{'.'.join(map(str, axes))}")
        return Plane(self.fresh(slot, math.prod(sizes)).reshape(shape), axes)

    def statistic(self, x: Labels, dims: Iterable[int]) -> Labels:
        """A value of which a statistic is taken over the axes `dims`: labels along them stay, or leave inexactly.

        Where a grid has further axes, whole slices along these leave.
        """
        kept, axes = [], set(dims)
        for plane in x.planes:
            inside = [axis for axis in plane.axes if axis in axes]
            if len(inside) == len(plane.axes):
                self.inexact(x, plane, f"{self.describe()} takes a statistic over the channels")
            elif inside:
                first = plane.core
                for axis in inside:
                    first = first.narrow(axis, 0, 1)
                self.tie(first, plane.core)
            kept.append(plane)
        return Labels(x.shape, tuple(kept))

    def inexact(self, x: Labels, plane: Plane, reason: str) -> None:
        """Say that what the node at hand gives changes when channels of `plane` leave: they stay."""
        self.freeze(plane.core, reason)

    def settle(
        self, tensors: Sequence[Tensor], shape: Sequence[int], output: int = 0, *, ragged: Sequence[bool] = ()
    ) -> Labels:
        """The value of a data-movement op, from its results on the label tensors of each plane.

        `ragged` tells for each plane whether its slices along the last axis keep channels of their own.
        """
        planes, single = [], []
        for index, tensor in enumerate(tensors):
            axes = self.axes_of(tensor, output, index)
            core = core_of(tensor, axes)
            if not axes:
                self.freeze(core, f"a single channel is taken out by {self.describe()}")
                single.append(float(core.reshape(-1)[0]))
                continue
            apart = len(axes) > 1 and any(ragged[index : index + 1])
            if len(axes) > 1 and not apart:
                self.choose(grid_options(core, axes))
            planes.append(Plane(core, axes, apart))
        return Labels(tuple(shape), tuple(planes), single=tuple(single))

    def describe(self) -> str:
        """The node at hand, as an error or a reason names it."""
        target = self.node.target
        if self.node.op == "call_module":
            return f"{type(self.module()).__name__} {target}"
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return f"{name} (node {self.node.name})"

    def module(self, node: fx.Node | None = None) -> nn.Module:
        """The module that the node calls (the one at hand by default)."""
        return self.graph.get_submodule(str((node or self.node).target))


def grid_options(core: Tensor, axes: Iterable[int]) -> list[Option]:
    """The ways to narrow a grid of labels: along one of its axes at a time, whole slices of it."""
    options = []
    for axis in axes:
        slices = core.movedim(axis, 0).reshape(core.shape[axis], -1)
        options.append(Option(((slices[:, :1], slices),)))
    return options


def labels_in(values: Any) -> list[Labels]:
    """Every `Labels` in nested arguments, in order."""
    if isinstance(values, Labels):
        return [values]
    if type(values) in (tuple, list):  # pytree takes ten times as long
        return [labels for value in values for labels in labels_in(value)]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Labels)]


def _slices_go(planes: Iterable[Plane], axis: int) -> Option:
    """The option that whole slices along `axis` go: of every plane that has it; the others stay."""
    mine = [plane.core.movedim(axis, 0) for plane in planes if axis in plane.axes]
    slices = [core.reshape(len(core), -1) for core in mine]
    others = tuple(plane.core.reshape(-1) for plane in planes if axis not in plane.axes)
    return Option(tuple((slices[0][:, :1], each) for each in slices), others)


def clusters(inputs: Sequence[Sequence[Plane]]) -> list[tuple[int, ...]]:
    """The sets of axes of all planes, those that overlap united, in order of their first axis."""
    found: list[set[int]] = []
    for planes in inputs:
        for plane in planes:
            axes = set(plane.axes)
            for other in [cluster for cluster in found if cluster & axes]:
                axes |= other
                found.remove(other)
            found.append(axes)
    return sorted(tuple(sorted(axes)) for axes in found)


def _depend_on_inputs(graph: fx.GraphModule) -> set[str]:
    dynamic: set[str] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(source.name in dynamic for source in node.all_input_nodes):
            dynamic.add(node.name)
    return dynamic


def owners_of(graph: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _get_tensor(graph: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    value = getattr(graph.get_submodule(path), leaf, None)
    return value if isinstance(value, Tensor) else None
