"""The calibration batches as a captured graph takes them, and which of their samples are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import Unpack, batch_to_device, count_of, fitted, sample_count
from fxprune.caller.example import to_device
from fxprune.caller.isolation import applied, device_of, evaluating
from fxprune.caller.rank_batches import Share
from fxprune.caller.ranks import gathered, in_all, rank_and_size, summed, together
from fxprune.errors import CalibrationError, blaming
from fxprune.recovery.compensation.lockstep import live_bytes
from fxprune.scoring.objective import Part
from fxprune.scoring.probes import Rows as Samples
from fxprune.scoring.probes import rows_of
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.finite import spoiled
from fxprune.tracing.graph import ModelGraph, example_of
from fxprune.tracing.part import Run, call_whole, name_of, with_part

MEMORY = 2 << 30  # bytes for the values of the calibration batches
EVERY = 5  # the last of so many samples is held out
Inputs = Sequence[Any]  # of one batch: the values of a graph's placeholders


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a graph is given for each batch, and for each batch (samples,) which of its samples are held out.

    Every fifth sample is; of fewer than five the last, and of one none. `samples` says for the nodes of the graph where
    the samples lie in what they give; None for those that do not depend on how many there are. `ranks` are those that
    have a share of the batches each; what they find is put together by `summed` and `gathered`.
    `numbers` are those of the batches in the loader, where they are not just the first ones.
    """

    inputs: Sequence[Inputs]
    held: Sequence[Tensor]
    samples: Mapping[str, Samples | None]
    ranks: int = 1
    numbers: Sequence[int] | None = None

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of what all shares give, which has the same shape for each."""
        return summed(tensor) if self.ranks > 1 else tensor

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows that all shares give, one after the other."""
        return torch.cat(gathered(rows)) if self.ranks > 1 else rows

    @classmethod
    def of(cls, graph: ModelGraph, inputs: Sequence[Inputs]) -> Calibration:
        """The batches of a graph, split into those to fit to and those held out."""
        sizes = [length(values) for values in inputs]
        return cls(inputs, held_out(sum(sizes)).split(sizes), rows_of(graph))

    @property
    def judges(self) -> bool:
        """Whether there is something to fit to, and something held out to judge by."""
        return any(bool(mask.any()) for mask in self.held)

    def judged(self, graph: fx.GraphModule) -> list[tuple[Inputs, Tensor]]:
        """The samples that are held out, in batches no larger than those given, each with a mask of them.

        All of a batch where its samples cannot be told apart.
        """
        found = list[tuple[Inputs, Tensor]]()
        for batch, held in enumerate(self.held):
            if bool(held.any()):
                values = self._selected(graph, batch, held)
                whole = values is None
                found.append((self.inputs[batch] if values is None else values, held if whole else held[held]))
        return self._joined(graph, found)

    def _joined(self, graph: fx.GraphModule, parts: Sequence[tuple[Inputs, Tensor]]) -> list[tuple[Inputs, Tensor]]:
        """Batches of chosen samples, neighbours together as long as they are no larger than the largest one given."""
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        axes = [rows.axis for name in names if (rows := self.samples.get(name, Samples(times=0))) and rows.times == 1]
        if len(axes) < len(names):
            return list(parts)
        most, joined = max(len(held) for held in self.held), list[tuple[Inputs, Tensor]]()
        for values, mask in parts:
            if joined and len(joined[-1][1]) + len(mask) <= most and _fit(joined[-1][0], values, axes):
                before, seen = joined.pop()
                both = [torch.cat(pair, axis) for *pair, axis in zip(before, values, axes, strict=True)]
                joined.append((both, torch.cat([seen, mask])))
            else:
                joined.append((values, mask))
        return joined

    def fitted(self, graph: fx.GraphModule, most: int) -> Calibration:
        """Of the samples that are not held out at most so many, drawn at random, by the same seed every time.

        All of a batch where its samples cannot be told apart.
        """
        drawn = _drawn(torch.cat(list(self.held)), most).split([len(held) for held in self.held])
        inputs, masks, numbers = list[Inputs](), list[Tensor](), list[int]()
        known = range(len(self.inputs)) if self.numbers is None else self.numbers
        for batch, (held, chosen) in enumerate(zip(self.held, drawn, strict=True)):
            found = self._selected(graph, batch, chosen)
            if found is not None and not bool(chosen.any()):
                continue
            inputs.append(self.inputs[batch] if found is None else found)
            masks.append(held if found is None else held[chosen])
            numbers.append(known[batch])
        return replace(self, inputs=inputs, held=masks, numbers=numbers)

    def _selected(self, graph: fx.GraphModule, batch: int, chosen: Tensor) -> Inputs | None:
        """Some samples of a batch, by a mask, or None where it does not show where its samples lie."""
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        found = [self._chosen(name, value, chosen) for name, value in zip(names, self.inputs[batch], strict=True)]
        return None if any(value is None for value in found) else [value[0] for value in found if value is not None]

    def _chosen(self, name: str, value: Any, chosen: Tensor) -> tuple[Any] | None:
        """What an input is for the chosen samples alone, or None where that does not show."""
        if not isinstance(value, Tensor):
            return None if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) else (value,)
        samples = self.samples.get(name, Samples(times=0))
        if samples is None:
            return (value,)
        if samples.times != 1 or value.ndim <= samples.axis or value.shape[samples.axis] != len(chosen):
            return None
        return (value.index_select(samples.axis, chosen.nonzero().flatten().to(value.device)),)

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


def _fit(a: Inputs, b: Inputs, axes: Sequence[int]) -> bool:
    """Whether two batches can be joined along these axes: their other sizes and their types agree."""
    return all(
        x.dtype == y.dtype and x.movedim(axis, 0).shape[1:] == y.movedim(axis, 0).shape[1:]
        for x, y, axis in zip(a, b, axes, strict=True)
    )


def _drawn(held: Tensor, most: int) -> Tensor:
    """A mask of at most so many of the samples that are not held out."""
    rest = (~held).nonzero().flatten()
    drawn = torch.zeros_like(held)
    drawn[rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:most]]] = True
    return drawn


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
    max_samples: int | None = None,
) -> Calibration:
    """What the graph, a capture of the part of `model` at `submodule`, is given for the batches of a loader.

    As many batches, one at least, as the values of two graphs take no more than `memory` bytes for, and none once
    there are `max_samples` samples. A part that is
    called several times for a batch gives as many batches. Of several ranks, each reads its share, if every share has
    samples to fit to and samples to hold out; else each reads all.
    """
    a_sample = 2 * live_bytes(graph) / max(sample_count(example_of(graph)), 1)
    feed, count = (_from_run, count_of) if submodule or run else (_from_loader, _rows)
    share = Share(loader, unpack, count, max_samples)

    def read(source: Iterable[tuple[Any, Any]]) -> Calibration:
        found, numbers, samples = list[Inputs](), list[int](), 0
        for number, values in feed(model, graph, source, submodule, run):
            samples += length(values)
            if found and a_sample * samples > memory:
                break
            if (said := spoiled(graph, values)) is not None:
                raise CalibrationError(f"{said} on batch {number} of the loader: leave that sample out")
            found.append(values)
            numbers.append(number)
        return replace(Calibration.of(graph, found), numbers=numbers)

    with torch.no_grad():
        with together("reading the calibration batches"):
            own = read((inputs, targets) for _, inputs, targets in share)
        if in_all(own.judges):
            return replace(own, ranks=rank_and_size()[1])
        # a single rank, or one of several that has nothing to fit or judge by
        return read((inputs, targets) for _, inputs, targets in share.whole())


def _rows(inputs: Any, _: Any) -> int:
    return sample_count(inputs)


def _from_loader(
    model: nn.Module, graph: ModelGraph, source: Iterable[tuple[Any, Any]], submodule: str, run: Run | None
) -> Iterable[tuple[int, Inputs]]:
    """Batches as the graph takes them, with their numbers, it being all of the model."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    for number, (inputs, _) in enumerate(source):
        with blaming("moving to the model's device", f"batch {number}"):
            values = placeholder_values(graph, to_device(fitted(inputs, names), device_of(graph)))
        yield number, values


def _from_run(
    model: nn.Module, graph: ModelGraph, source: Iterable[tuple[Any, Any]], submodule: str, run: Run | None
) -> Iterable[tuple[int, Inputs]]:
    """What a part of a model is called with on batches, with their numbers."""
    device, calls = device_of(graph), list[Inputs]()

    def record(_: nn.Module, values: Inputs) -> None:
        calls.append(pytree.tree_map_only(Tensor, torch.clone, list(values)))

    part = Part(graph, graph, name_of(model, submodule))
    whole = applied(with_part(model, submodule, part), "to", device)
    handle = graph.register_forward_pre_hook(record)
    try:
        with evaluating(whole):
            for number, (inputs, targets) in enumerate(source):
                with blaming("run=" if run else "the model", f"batch {number}"):
                    call_whole(whole, *batch_to_device((inputs, targets), device), run=run)
                yield from ((number, values) for values in calls)
                calls.clear()
    finally:
        handle.remove()
