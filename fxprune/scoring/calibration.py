"""The calibration batches as a captured graph takes them; some of their samples are held out to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import Unpack, batch_to_device, count_of, model_inputs, sample_count
from fxprune.caller.example import to_device
from fxprune.caller.isolation import applied, device_of, evaluating
from fxprune.caller.rank_batches import RankBatches
from fxprune.caller.ranks import gathered, in_all, rank_and_size, summed, together
from fxprune.errors import CalibrationError, blaming
from fxprune.scoring.lockstep import live_bytes
from fxprune.scoring.objective import GatedPart
from fxprune.scoring.sample_axes import SampleAxis, sample_axes
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.finite import spoiled
from fxprune.tracing.graph import ModelGraph, example_of
from fxprune.tracing.part import Run, call_whole, name_of, with_part

MEMORY = 2 << 30  # bytes for the values of the calibration batches
EVERY = 5  # the last of so many samples is held out
Inputs = Sequence[Any]  # of one batch: the values of a graph's placeholders


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The inputs of a graph for each batch, and for each batch a mask (samples,) of the samples that are held out.

    Every fifth sample is; of fewer than five the last, and of one none. `samples` are the sample axes of the graph's
    nodes. Each of `ranks` has a share of the batches; `summed` and `gathered` combine them. `numbers` are the batches'
    numbers in the loader, if they are not the first ones. `targets` are those of the first batch. `rewritten` are
    the inputs of the rewritten graph, where other parts of the model that were pruned before make them differ.
    """

    inputs: Sequence[Inputs]
    held: Sequence[Tensor]
    samples: Mapping[str, SampleAxis | None]
    ranks: int = 1
    numbers: Sequence[int] | None = None
    targets: Any = None
    rewritten: Sequence[Inputs] | None = None

    @property
    def of_rewritten(self) -> Calibration:
        """The same samples with the inputs of the rewritten graph."""
        return self if self.rewritten is None else replace(self, inputs=self.rewritten, rewritten=None)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all shares of a tensor that has the same shape for each."""
        return summed(tensor) if self.ranks > 1 else tensor

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all shares, one after the other."""
        return torch.cat(gathered(rows)) if self.ranks > 1 else rows

    @classmethod
    def of(cls, graph: ModelGraph, inputs: Sequence[Inputs]) -> Calibration:
        """The batches of a graph, split into samples to fit to and samples held out."""
        sizes = [length(values) for values in inputs]
        return cls(inputs, held_out(sum(sizes)).split(sizes), sample_axes(graph))

    @property
    def judges(self) -> bool:
        """Whether there are samples to fit to, and samples held out to judge by."""
        return any(bool(mask.any()) for mask in self.held)

    def judged(self, graph: fx.GraphModule, at_once: int | None = None) -> list[tuple[Inputs, Tensor]]:
        """The samples that are held out, each batch with a mask of them; all of a batch that cannot be split.

        In batches of at most `at_once` samples, by default as many as the largest batch given; neighbours are joined.
        """
        most = max(map(len, self.held), default=0) if at_once is None else at_once
        joined, axes = list[tuple[Inputs, Tensor]](), self._axes(graph)
        for values, mask in self._held(graph, most):
            if axes and joined and len(joined[-1][1]) + len(mask) <= most and _fit(joined[-1][0], values, axes):
                before, seen = joined.pop()
                both = [torch.cat(pair, axis) for *pair, axis in zip(before, values, axes, strict=True)]
                joined.append((both, torch.cat([seen, mask])))
            else:
                joined.append((values, mask))
        return joined

    def _held(self, graph: fx.GraphModule, most: int) -> Iterator[tuple[Inputs, Tensor]]:
        """The samples that are held out, at most so many at once, or all of a batch that cannot be split."""
        for batch, held in enumerate(self.held):
            for rows in held.nonzero().flatten().split(max(most, 1)) if bool(held.any()) else ():
                chosen = self._selected(graph, batch, torch.zeros_like(held).index_fill(0, rows, value=True))
                if chosen is None:
                    yield self.inputs[batch], held
                    break
                yield chosen, held[rows]

    def with_fewer(self, most: int) -> Calibration:
        """The same with at most so many samples held out, drawn at random, by the same seed every time."""
        return replace(self, held=_drawn(torch.cat(list(self.held)), most).split([len(held) for held in self.held]))

    def _axes(self, graph: fx.GraphModule) -> list[int] | None:
        """The axis of the samples of each input, or None where an input has none, or several places a sample."""
        found = [self.samples.get(name) for name in _names(graph)]
        axes = [axis.index for axis in found if axis is not None and axis.times == 1]
        return axes if len(axes) == len(found) else None

    def fitted(self, graph: fx.GraphModule, most: int) -> Calibration:
        """At most so many of the samples that are not held out, drawn at random, by the same seed every time.

        All of a batch that cannot be split.
        """
        drawn = _drawn(~torch.cat(list(self.held)), most)
        chosen_of = drawn.split([len(held) for held in self.held])
        inputs, masks, numbers = list[Inputs](), list[Tensor](), list[int]()
        known = range(len(self.inputs)) if self.numbers is None else self.numbers
        for batch, (held, chosen) in enumerate(zip(self.held, chosen_of, strict=True)):
            found = self._selected(graph, batch, chosen)
            if found is None or bool(chosen.any()):
                inputs.append(self.inputs[batch] if found is None else found)
                masks.append(held if found is None else held[chosen])
                numbers.append(known[batch])
        others = None if self.rewritten is None else self.of_rewritten.fitted(graph, most).inputs
        return replace(self, inputs=inputs, held=masks, numbers=numbers, rewritten=others)

    def _selected(self, graph: fx.GraphModule, batch: int, chosen: Tensor) -> Inputs | None:
        """Some samples of a batch, by a mask, or None where an input does not show its samples."""
        found = []
        for name, value in zip(_names(graph), self.inputs[batch], strict=True):
            axis = self.samples.get(name, SampleAxis(times=0))
            if not isinstance(value, Tensor):
                if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                    return None
                found.append(value)
            elif axis is None:
                found.append(value)
            elif axis.times != 1 or value.ndim <= axis.index or value.shape[axis.index] != len(chosen):
                return None
            else:
                found.append(value.index_select(axis.index, chosen.nonzero().flatten().to(value.device)))
        return found

    def folds(self, graph: fx.GraphModule, count: int) -> list[tuple[Calibration, Calibration]]:
        """`count` splits of the data: all but a share of the samples, and that share alone, all of it held out.

        Each sample is in one of the shares. Batches that cannot be split are set apart whole; a single such batch gives
        no splits.
        """
        sizes = [len(held) for held in self.held]
        count = min(count, sum(sizes))
        masks = [(torch.arange(sum(sizes)) % count == count - 1 - fold).split(sizes) for fold in range(count)]
        if any(self._selected(graph, batch, held) is None for batch, held in enumerate(self.held)):
            count = min(count, len(sizes))
            masks = [
                tuple(torch.full((size,), batch % count == fold) for batch, size in enumerate(sizes))
                for fold in range(count)
            ]
        return [
            (self._part(graph, [~m for m in mask]), self._part(graph, mask, judged=True))
            for mask in masks * (count > 1)
        ]

    def _part(self, graph: fx.GraphModule, masks: Sequence[Tensor], *, judged: bool = False) -> Calibration:
        """The samples that masks choose; all of them are held out, or some as usual."""
        known = range(len(self.inputs)) if self.numbers is None else self.numbers
        own = [batch for batch, mask in enumerate(masks) if bool(mask.any())]
        sizes = [int(masks[batch].sum()) for batch in own]
        held = torch.ones(sum(sizes), dtype=torch.bool) if judged else held_out(sum(sizes))
        values = [
            self.inputs[batch] if bool(masks[batch].all()) else self._selected(graph, batch, masks[batch]) or []
            for batch in own
        ]
        others = None if self.rewritten is None else self.of_rewritten._part(graph, masks).inputs
        numbers = [known[batch] for batch in own]
        return replace(self, inputs=values, held=held.split(sizes), numbers=numbers, rewritten=others)

    def mask(self, node: str, values: Tensor, batch: int, channels: int) -> Tensor:
        """The held-out places in the value of a node, as a mask that broadcasts to its shape.

        Where samples cannot be told apart, every fifth place of the longest axis other than that of the `channels`.
        """
        samples, held = self.samples.get(node, SampleAxis()), self.held[batch]
        sizes = [1 if axis == channels % values.ndim else size for axis, size in enumerate(values.shape)]
        if samples is not None and samples.index < values.ndim and sizes[samples.index] == samples.times * len(held):
            axis, found = samples.index, held.repeat_interleave(samples.times)
        else:
            axis = sizes.index(max(sizes))
            found = held_out(sizes[axis])
        return found.to(values.device).reshape([-1 if a == axis else 1 for a in range(values.ndim)])


def held_out(count: int) -> Tensor:
    """A mask of the samples that are held out, of so many.

    >>> held_out(6), held_out(2)
    (tensor([False, False, False, False,  True, False]), tensor([False,  True]))
    """
    order = torch.arange(count)
    return order % EVERY == EVERY - 1 if count >= EVERY else (order == count - 1) & (order > 0)


def _drawn(mask: Tensor, most: int) -> Tensor:
    """At most so many of the places that a mask marks, drawn at random, by the same seed every time."""
    places, drawn = mask.nonzero().flatten(), torch.zeros_like(mask)
    drawn[places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:most]]] = True
    return drawn


def _names(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


def _fit(a: Inputs, b: Inputs, axes: Sequence[int]) -> bool:
    """Whether two batches can be joined along these axes: their other sizes and their types agree."""
    return all(
        x.dtype == y.dtype and x.movedim(axis, 0).shape[1:] == y.movedim(axis, 0).shape[1:]
        for x, y, axis in zip(a, b, axes, strict=True)
    )


def length(values: Inputs) -> int:
    """The number of samples of a batch."""
    return next((len(x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.ndim), 1)


def calibration_of(
    model: nn.Module, graph: ModelGraph, loader: Iterable[Any], *, submodule: str = "", unpack: Unpack | None = None,
    run: Run | None = None, memory: int = MEMORY, max_samples: int | None = None,
) -> Calibration:  # fmt: skip
    """The inputs of a graph, a capture of the part of `model` at `submodule`, for the batches of a loader.

    Batches are read until the values of two graphs would take more than `memory` bytes, but at least one is, and none
    after `max_samples` samples. A part that is called several times per batch gives that many batches. With several
    ranks, each reads its share if every share has samples to fit to and samples to hold out; otherwise each reads all.
    """
    a_sample = 2 * live_bytes(graph) / max(sample_count(example_of(graph)), 1)
    whole = not submodule and run is None
    feed = partial(_of_graph, graph) if whole else partial(_of_part, model, graph, submodule, run)
    share = RankBatches(loader, unpack, (lambda inputs, _: sample_count(inputs)) if whole else count_of, max_samples)

    def read(source: Iterable[tuple[Any, Any, Any]]) -> Calibration:
        found, numbers, samples, targets = list[Inputs](), list[int](), 0, list[Any]()

        def noted() -> Iterator[tuple[Any, Any, Any]]:
            for batch in source:
                targets.append(batch[2])
                yield batch

        for number, values in feed(noted()):
            samples += length(values)
            if found and a_sample * samples > memory:
                break
            if (said := spoiled(graph, values)) is not None:
                raise CalibrationError(f"{said} on batch {number} of the loader: leave that sample out")
            found.append(values)
            numbers.append(number)
        return replace(Calibration.of(graph, found), numbers=numbers, targets=next(iter(targets), None))

    with torch.no_grad():
        with together("reading the calibration batches"):
            own = read(share)
        if in_all(own.judges):
            return replace(own, ranks=rank_and_size()[1])
        return read(share.whole())  # there is a single rank, or one that has nothing to fit or judge by


def _of_graph(graph: ModelGraph, source: Iterable[tuple[Any, Any, Any]]) -> Iterator[tuple[int, Inputs]]:
    """Batches as the graph of a whole model takes them, with their numbers."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    for number, (_, inputs, _) in enumerate(source):
        with blaming("moving to the model's device", f"batch {number}"):
            values = placeholder_values(graph, to_device(model_inputs(inputs, names), device_of(graph)))
        yield number, values


def _of_part(
    model: nn.Module, graph: ModelGraph, submodule: str, run: Run | None, source: Iterable[tuple[Any, Any, Any]]
) -> Iterator[tuple[int, Inputs]]:
    """The inputs of every call of a part of a model on batches, with the numbers of these."""
    device, calls = device_of(graph), list[Inputs]()

    def record(_: nn.Module, values: Inputs) -> None:
        calls.append(pytree.tree_map_only(Tensor, torch.clone, list(values)))

    part = GatedPart(graph, graph, name_of(model, submodule))
    whole = applied(with_part(model, submodule, part), "to", device)
    handle = graph.register_forward_pre_hook(record)
    try:
        with evaluating(whole):
            for number, (_, inputs, targets) in enumerate(source):
                with blaming("run=" if run else "the model", f"batch {number}"):
                    call_whole(whole, *batch_to_device((inputs, targets), device), run=run)
                yield from ((number, values) for values in calls)
                calls.clear()
    finally:
        handle.remove()
