"""The calibration batches as a captured graph takes them, and which of their samples are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.batches import Unpack, batches, fitted, sample_count, to_device
from fxprune.capture import ModelGraph, example_of, placeholder_values
from fxprune.compensation.lockstep import live_bytes
from fxprune.isolation import device_of, evaluating
from fxprune.objective import Part
from fxprune.probes import Rows as Samples
from fxprune.probes import rows_of
from fxprune.submodule import Run, call_whole, name_of, with_part

MEMORY = 2 << 30  # bytes for the values of the calibration batches
EVERY = 5  # the last of so many samples is held out
Inputs = Sequence[Any]  # of one batch: the values of a graph's placeholders


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a graph is given for each batch, and for each batch (samples,) which of its samples are held out.

    Every fifth sample is; of fewer than five the last, and of one none. `samples` says for the nodes of the graph where
    the samples lie in what they give; None for those that do not depend on how many there are.
    """

    inputs: Sequence[Inputs]
    held: Sequence[Tensor]
    samples: Mapping[str, Samples | None]

    @classmethod
    def of(cls, graph: ModelGraph, inputs: Sequence[Inputs]) -> Calibration:
        """The batches of a graph, split into those to fit to and those held out."""
        sizes = [length(values) for values in inputs]
        return cls(inputs, held_out(sum(sizes)).split(sizes), rows_of(graph))

    @property
    def judges(self) -> bool:
        """Whether there is something to fit to, and something held out to judge by."""
        return any(bool(mask.any()) for mask in self.held)

    def judged(self, graph: fx.GraphModule, batch: int) -> tuple[Inputs, Tensor] | None:
        """The samples of a batch that are held out, with a mask of them; None where the batch has none.

        The whole batch, where it does not show in which of its tensors, and along which axis, its samples lie.
        """
        values, held = self.inputs[batch], self.held[batch]
        if not bool(held.any()):
            return None
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        chosen = [self._chosen(name, value, held) for name, value in zip(names, values, strict=True)]
        if any(value is None for value in chosen):
            return values, held
        return [value[0] for value in chosen if value is not None], held[held]

    def _chosen(self, name: str, value: Any, held: Tensor) -> tuple[Any] | None:
        """What an input is for the samples held out alone, or None where that does not show."""
        if not isinstance(value, Tensor):
            return None if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) else (value,)
        samples = self.samples.get(name, Samples(times=0))
        if samples is None:
            return (value,)
        if samples.times != 1 or value.ndim <= samples.axis or value.shape[samples.axis] != len(held):
            return None
        return (value.index_select(samples.axis, held.nonzero().flatten().to(value.device)),)

    def mask(self, node: str, values: Tensor, batch: int, channels: int) -> Tensor:
        """Which places of the value of a node are held out, as a tensor that broadcasts to its shape.

        Where samples cannot be told apart, every fifth place is of the longest axis that is not that of the `channels`.
        """
        samples, held = self.samples.get(node, Samples()), self.held[batch]
        sizes = [1 if axis == channels % values.ndim else size for axis, size in enumerate(values.shape)]
        if samples is not None and samples.axis < values.ndim and sizes[samples.axis] == samples.times * len(held):
            axis, found = samples.axis, held.repeat_interleave(samples.times)
        else:
            axis = sizes.index(max(sizes))
            found = held_out(sizes[axis])
        return found.to(values.device).reshape([-1 if a == axis else 1 for a in range(values.ndim)])


def held_out(count: int) -> Tensor:
    """Which of so many samples are held out.

    >>> held_out(6), held_out(2)
    (tensor([False, False, False, False,  True, False]), tensor([False,  True]))
    """
    order = torch.arange(count)
    return order % EVERY == EVERY - 1 if count >= EVERY else (order == count - 1) & (order > 0)


def length(values: Inputs) -> int:
    """The number of samples of a batch."""
    return next((len(x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.ndim), 1)


def calibration_of(
    model: nn.Module,
    graph: ModelGraph,
    loader: Iterable[Any],
    *,
    submodule: str = "",
    unpack: Unpack | None = None,
    run: Run | None = None,
    memory: int = MEMORY,
) -> Calibration:
    """What the graph, a capture of the part of `model` at `submodule`, is given for the batches of a loader.

    As many batches, one at least, as the values of two graphs take no more than `memory` bytes for. A part that is
    called several times for a batch gives as many batches.
    """
    a_sample = 2 * live_bytes(graph) / max(sample_count(example_of(graph)), 1)
    feed = _from_run if submodule or run else _from_loader
    found: list[Inputs] = []
    samples = 0
    with torch.no_grad():
        for values in feed(model, graph, loader, submodule, unpack, run):
            samples += length(values)
            if found and a_sample * samples > memory:
                break
            found.append(values)
    return Calibration.of(graph, found)


def _from_loader(
    model: nn.Module, graph: ModelGraph, loader: Iterable[Any], submodule: str, unpack: Unpack | None, run: Run | None
) -> Iterable[Inputs]:
    """The batches of a loader as the graph takes them, it being all of the model."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    for inputs, _ in batches(loader, unpack):
        yield placeholder_values(graph, to_device(fitted(inputs, names), device_of(graph)))


def _from_run(
    model: nn.Module, graph: ModelGraph, loader: Iterable[Any], submodule: str, unpack: Unpack | None, run: Run | None
) -> Iterable[Inputs]:
    """What a part of a model is called with on the batches of a loader."""
    device, calls = device_of(graph), list[Inputs]()

    def record(_: nn.Module, values: Inputs) -> None:
        calls.append(pytree.tree_map_only(Tensor, torch.clone, list(values)))

    part = Part(graph, graph, name_of(model, submodule))
    whole = with_part(model, submodule, part).to(device)
    handle = graph.register_forward_pre_hook(record)
    try:
        with evaluating(whole):
            for inputs, targets in batches(loader, unpack):
                call_whole(whole, *to_device((inputs, targets), device), run=run)
                yield from calls
                calls.clear()
    finally:
        handle.remove()
