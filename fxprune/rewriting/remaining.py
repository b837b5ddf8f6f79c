"""The labels kept in a rewritten graph, and the tensors narrowed to them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arrays import Flags
from fxprune.caller.isolation import ready_copies
from fxprune.caller.tensors import FORMATS, laid_out, memory_format_of
from fxprune.coupling.branch_units import shortcuts_of
from fxprune.coupling.groups import Coupling
from fxprune.coupling.interpreter import step
from fxprune.errors import FxpruneError
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, Plane, is_constant_beside
from fxprune.rules.vocabulary import GIVEN_UP, ChannelRead, Comparison, Option, Slot
from fxprune.tracing.graph import ModelGraph

Shape = tuple[int, ...]
Planes = tuple[Plane, ...]


class MismatchError(FxpruneError):
    """A node of a rewritten graph does not carry the labels that it should.

    `node` is its name in the original graph, where it is known.
    """

    node: str | None = None


def narrowed_copy(module: Any, checker: Checker, prefix: str = "") -> Any:
    """A deep copy of a module in which every parameter and buffer that loses channels is narrower, under all its names.

    No weight is copied whole first. `prefix` is the path of `module` in the model.
    """
    memo: dict[int, Any] = ready_copies(module)
    for path, inner in module.named_modules():
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                owner = checker.owners[".".join(part for part in (prefix, path, name) if part)]
                small = narrow(tensor, [checker.kept(Slot(owner, axis)) for axis in range(tensor.ndim)])
                memo |= {id(tensor): small} if small is not tensor else {}
    return copy.deepcopy(module, memo)


def narrow(tensor: Tensor, keep: Sequence[Tensor | None]) -> Tensor:
    """A new tensor with only the kept indices of each axis; the tensor itself where all are kept."""
    data = selected(tensor.detach(), keep)
    if data.shape == tensor.shape:
        return tensor
    name = memory_format_of(tensor)
    data = laid_out(data, FORMATS[name]) if name else data.contiguous()
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def selected(tensor: Tensor, keep: Sequence[Tensor | None]) -> Tensor:
    """The kept indices of each axis of a tensor, by a mask for each axis or None for all."""
    for axis, mask in enumerate(keep):
        if mask is not None and not bool(mask.all()):
            tensor = tensor.index_select(axis, mask.nonzero().flatten().to(tensor.device))
    return tensor


class Checker(Context):
    """The pass that seeds a rewritten graph with the kept labels, and compares the labels at every node."""

    def __init__(self, graph: ModelGraph, coupling: Coupling, keep: Flags) -> None:
        super().__init__(graph)
        self.coupling, self.old = coupling, coupling.values
        self.kept_labels = torch.from_numpy(np.append(keep, True)[np.append(coupling.unit_of, -1)])
        self.merged = torch.from_numpy(np.append(coupling.merged, -1))
        self.original = self.node
        self.shortcuts = shortcuts_of(coupling)
        self.expected_values: dict[str, Any] = {}
        self.restricted: dict[tuple[Shape, Planes], tuple[Shape, Planes]] = {}

    def spec(self, node: fx.Node | None = None) -> Any:
        return self.coupling.specs[(node or self.original).name]

    def name(self) -> str:
        return self.original.name

    def kept(self, slot: Slot) -> Tensor | None:
        """The kept indices of a slot, or None where the slot has no labels."""
        if slot not in self.coupling.slots:
            return None
        start, size = self.coupling.slots[slot]
        return self.kept_labels[start : start + size]

    def tie(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(self.merged[a.long()], self.merged[b.long()])
        if bool(((a != b) & (a >= 0) & (b >= 0)).any()):
            raise MismatchError(f"channels of different units meet in {self.describe()}")

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Nothing: frozen channels are kept, and the labels show it."""

    def choose(self, options: Sequence[Option], *, ordered: bool = False) -> None:
        def holds(option: Option) -> bool:
            try:
                for a, b in option.ties:
                    self.tie(a, b)
            except MismatchError:
                return False
            return True

        if not any(holds(option) for option in options):
            raise MismatchError(f"the kept channels are not rectangular in {self.describe()}")

    def produce(self, labels: Tensor, site: str) -> None:
        """Nothing: sites are known."""

    def balance(self, *sites: str) -> None:
        """Nothing: the plan was checked for it."""

    def outnumber(self, site: str, other: str) -> None:
        """Nothing: the plan was checked for it."""

    def edge(self, reading: ChannelRead) -> None:
        """Nothing: edges are known."""

    def compare(self, comparison: Comparison) -> None:
        """Nothing: comparisons are edges, which are known."""

    def choose_by_number(self, labels: Tensor) -> None:
        """Nothing: experts are known."""

    def tell_apart(self, expert: Tensor) -> None:
        """Nothing: branches are known."""

    def take_out(self, label: Tensor, reason: str) -> None:
        """Nothing: as `freeze`."""

    def mark_numbers(self, labels: Tensor, experts: Tensor) -> None:
        """Nothing: as `tell_apart`."""

    def fresh(self, slot: Slot, size: int) -> Tensor:
        start, length = self.coupling.slots.get(slot, (0, 0))
        labels = torch.arange(start, start + length, dtype=torch.float64)[self.kept_labels[start : start + length]]
        if len(labels) != size:
            raise MismatchError(f"axis {slot.axis} of {slot.owner} has {size} channels in place of {len(labels)}")
        return labels

    def remember(self, what: str, value: int) -> int:
        found = self.coupling.remembered.get((self.original.name, what), 1 if value == 1 else None)
        if found is None:
            raise MismatchError(f"the original has no {what} of {self.describe()}")
        return found

    def is_given_up(self) -> bool:
        return (self.original.name, GIVEN_UP) in self.coupling.remembered

    def slot_axes(self, owner: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(shape)) if Slot(owner, axis) in self.coupling.slots)

    def axes_of(self, tensor: Tensor, output: int, plane: int) -> tuple[int, ...]:
        axes = self.coupling.axes.get((self.original.name, output, plane))
        if axes is None or not is_constant_beside(tensor, axes):
            raise MismatchError(f"the channels do not lie along axes {axes} in {self.describe()}")
        return axes

    def checked(self, node: fx.Node, original: fx.Node) -> Any:
        """The node's value, compared with the narrowed value of the original node."""
        self.original = original
        value = step(self, node, unknown="freeze")
        found, wanted = pytree.tree_leaves(value), pytree.tree_leaves(self.expected(original))
        if len(found) != len(wanted) or not all(map(_agree, found, wanted)):
            raise MismatchError(f"node {node.name} has other labels than the kept ones of the original")
        return value

    def expected(self, node: fx.Node) -> Any:
        """The original value of a node, restricted to the kept labels."""
        if node.name not in self.expected_values:
            self.expected_values[node.name] = pytree.tree_map_only(Labels, self.restrict, self.old[node.name])
        return self.expected_values[node.name]

    def restrict(self, x: Labels) -> Labels:
        """A value without the indices of each axis that hold only removed channels."""
        if x.index_of is not None:
            x = replace(x, index_of=x.index_of[self._is_kept(x.index_of)])
        if not x.planes:
            return x
        key = x.shape, x.planes
        if key not in self.restricted:  # which many nodes share
            indices = [mask.nonzero().flatten() for mask in self.masks(x)]
            shape = [len(index) for index in indices]
            planes = tuple(self._restricted(plane, indices) for plane in x.planes)
            if any(plane.ragged for plane in planes):
                shape[-1] = planes[0].core.shape[-1]
            self.restricted[key] = tuple(shape), planes
        return Labels(*self.restricted[key], x.value, x.single, x.index_of)

    def masks(self, x: Labels) -> list[Tensor]:
        """The kept indices of each axis of a value of the original graph, as masks."""
        masks = [torch.ones(size, dtype=torch.bool) for size in x.shape]
        for plane in x.planes:
            for axis in plane.axes:
                masks[axis] &= self._is_kept(plane.core).movedim(axis, 0).reshape(x.shape[axis], -1).any(1)
        return masks

    def _restricted(self, plane: Plane, indices: list[Tensor]) -> Plane:
        core = plane.core
        if plane.ragged:  # each slice along the last axis keeps channels of its own
            kept = self._is_kept(core).reshape(-1, core.shape[-1])
            if len(kept.sum(1).unique()) != 1:
                raise MismatchError("the rows of a state keep different numbers of channels")
            return Plane(core.reshape(kept.shape)[kept].reshape(*core.shape[:-1], -1), plane.axes, ragged=True)
        for axis in plane.axes:
            core = core.index_select(axis, indices[axis])
        if not bool(self._is_kept(core).all()):
            raise MismatchError("the kept channels are not rectangular")
        return Plane(core, plane.axes)

    def _is_kept(self, labels: Tensor) -> Tensor:
        return self.kept_labels[labels.long()]


def _agree(a: Any, b: Any) -> bool:
    """Whether two values have the same shapes and, plane by plane, the same labels in order."""
    if not isinstance(a, Labels) or not isinstance(b, Labels):
        return isinstance(a, Labels) == isinstance(b, Labels)
    if a.shape != b.shape or a.single != b.single or len(a.planes) != len(b.planes):
        return False
    numbers = a.index_of, b.index_of
    if any(x is not y and (x is None or y is None or not torch.equal(x, y)) for x, y in [numbers]):
        return False
    return all(p.axes == q.axes and torch.equal(p.core, q.core) for p, q in zip(a.planes, b.planes, strict=True))
