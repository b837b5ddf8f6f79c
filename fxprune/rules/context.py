"""What a rule can say: the vocabulary shared by the pass that collects ties and the pass that checks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.example import TensorSpec
from fxprune.labels import NO_CHANNEL, Labels, Plane, core_of, vector_plane


@dataclass(frozen=True, slots=True)
class Slot:
    """One axis of a parameter, or a tagged axis that an operation makes by itself (padding, say)."""

    owner: str
    axis: int | str


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to keep a grid rectangular: pairs of label vectors to tie, and labels that then have to stay."""

    ties: tuple[tuple[Tensor, Tensor], ...]
    stays: tuple[Tensor, ...] = ()


class Context(ABC):
    """The state of one walk over a graph: the node at hand, the values so far, and what rules may say of them."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(graph.graph.nodes))
        self._dynamic = _depend_on_inputs(graph)
        self.owners = _owners(graph)

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
    def choose(self, options: Sequence[Option]) -> None:
        """Say that one of these options must hold; which one is chosen once all ties are known."""

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
    def edge(
        self, source: fx.Node, dim: int, labels: Tensor, through: Tensor | None, parameter: str | None = None
    ) -> None:
        """Say that the node at hand reads the channels `labels` along axis `dim` of what `source` gives.

        `through` are the labels that each of them is turned into, where a channel is turned into one alone; where
        these are tied to `labels`, as in a depthwise convolution, the channel only passes and is read further on.
        `parameter` names the parameter of the module at hand whose columns read them inside the module.
        """

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
        self.tie(slices[:, :1], slices)
        return slices[:, 0]

    def source(self, x: Labels) -> fx.Node | None:
        """The input node of the node at hand that gave `x`."""
        return next((node for node in self.node.all_input_nodes if self.env.get(node) is x), None)

    def is_constant(self, x: Labels) -> bool:
        """Whether `x`, an argument of the node at hand, depends on no input of the model."""
        return self.source(x) not in self._dynamic

    def consume(self, x: Labels, dim: int) -> Tensor:
        """The labels along axis `dim`, which the node at hand reads as its input channels."""
        labels = self.vector(x, dim)
        self.read(x, dim, labels)
        return labels

    def read(self, x: Labels, dim: int, labels: Tensor, through: Tensor | None = None) -> None:
        """Say that the node at hand reads `labels` along axis `dim` of `x`: the edge that is gated."""
        source = self.source(x)
        if source is not None and bool((labels != NO_CHANNEL).any()):
            self.edge(source, dim, labels, through)

    def recur(self, parameter: str, labels: Tensor) -> None:
        """Say that the module at hand reads its own units `labels` through axis 1 of its parameter `parameter`."""
        if bool((labels != NO_CHANNEL).any()):
            self.edge(self.node, 1, labels, None, parameter)

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
        merged = (self._merge(axes, aligned, sizes) for axes in _clusters(aligned))
        return Labels(tuple(shape), tuple(plane for plane in merged if plane is not None))

    def _merge(self, axes: tuple[int, ...], inputs: list[list[Plane]], sizes: list[tuple[int, ...]]) -> Plane | None:
        """The one plane that the inputs' planes over `axes` become, or None where it cannot be narrowed."""
        mine = [[plane for plane in planes if set(plane.axes) <= set(axes)] for planes in inputs]
        planes = [plane for some in mine for plane in some]
        blocked = any(len(some) > 1 for some in mine) or any(
            not some and any(size[axis] != 1 for axis in axes) for some, size in zip(mine, sizes, strict=True)
        )
        if blocked:
            for plane in planes:
                self.freeze(plane.core, f"meets values without channels in {self.describe()}")
            return None
        for other in planes[1:]:
            self.tie(planes[0].core, other.core)
        widest = max(planes, key=lambda plane: plane.core.numel())
        return Plane(widest.core, axes)

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
                single.append(float(core.reshape(-1)[0]) if core.numel() else NO_CHANNEL)
                continue
            apart = len(axes) > 1 and any(ragged[index : index + 1])
            if len(axes) > 1 and not apart:
                self.choose(grid_options(core, axes))
            planes.append(Plane(core, axes, apart))
        return Labels(tuple(shape), tuple(planes), single=tuple(single))

    def describe(self) -> str:
        """The node at hand, as an error or a reason names it."""
        target = self.node.target
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
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Labels)]


def _clusters(inputs: list[list[Plane]]) -> list[tuple[int, ...]]:
    """The sets of axes of all planes, those that overlap united, in order of their first axis."""
    clusters: list[set[int]] = []
    for planes in inputs:
        for plane in planes:
            axes = set(plane.axes)
            for other in [cluster for cluster in clusters if cluster & axes]:
                axes |= other
                clusters.remove(other)
            clusters.append(axes)
    return sorted(tuple(sorted(axes)) for axes in clusters)


def _depend_on_inputs(graph: fx.GraphModule) -> set[fx.Node]:
    dynamic: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(source in dynamic for source in node.all_input_nodes):
            dynamic.add(node)
    return dynamic


def _owners(graph: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _get_tensor(graph: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    value = getattr(graph.get_submodule(path), leaf, None)
    return value if isinstance(value, Tensor) else None
