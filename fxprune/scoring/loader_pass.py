"""The scoring pass: one forward and one backward over the loader, through a graph with a probe on every edge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.caller.batches import Classes, Unpack, batch_to_device, class_of_samples, count_of, length_of, sample_count
from fxprune.caller.isolation import applied, dtype_of, evaluating
from fxprune.caller.progress import progress_bar
from fxprune.caller.rank_batches import Numbered, RankBatches
from fxprune.caller.ranks import in_any, rank_and_size, together
from fxprune.coupling.gates import insert
from fxprune.coupling.groups import Coupling
from fxprune.errors import CalibrationError, blaming
from fxprune.scoring.eval_graph import fuse, keep_layouts
from fxprune.scoring.objective import GatedPart, Loss, Objective
from fxprune.scoring.probes import Probe
from fxprune.scoring.resuming import PassCheckpoint, PassState
from fxprune.scoring.sample_axes import SampleAxis, sample_axes
from fxprune.scoring.sampler import Sampler
from fxprune.tracing.part import Run, with_part


@dataclass(frozen=True, slots=True, eq=False)
class ScoringPass:
    """An objective, this rank's share of the loader, and the state that the pass sums up on a device."""

    objective: Objective
    share: RankBatches
    state: PassState
    device: torch.device

    @classmethod
    def through(
        cls, whole: nn.Module, path: str, name: str, coupling: Coupling, sampler: Sampler, loader: Iterable[Any],
        *, loss: Loss | None, unpack: Unpack | None, run: Run | None, device: torch.device, most: int | None,
    ) -> ScoringPass:  # fmt: skip
        """A pass through the captured part of a model at `path`, called `name` in messages, on `most` samples."""
        graph: Any = whole.get_submodule(path)
        dtype, axes = dtype_of(graph), sample_axes(graph)
        gated, gates = insert(
            graph, coupling, lambda edge: Probe(edge, sampler, device, dtype, axes.get(edge.source, SampleAxis())),
            compared=False,
        )  # fmt: skip
        fuse(gated, coupling.specs)
        keep_layouts(gated)
        part = GatedPart(gated, graph, name)
        own = applied(with_part(whole, path, part), "to", device)
        objective = Objective(own, part, loss or F.cross_entropy, run)
        state = PassState.of([gate for gate in gates if isinstance(gate, Probe)], sampler)
        return cls(objective, RankBatches(loader, unpack, objective.count, most), state, device)

    def run(self, classes: Classes | None, checkpoint: PassCheckpoint | None, *, progress: bool) -> None:
        """Go over the loader, after the batches of a checkpoint, and sum up over all ranks.

        Raises CalibrationError where there are no two classes to compare, or the loss does not reach the scored part.
        """
        state = self.state
        with evaluating(self.objective.whole), together("scoring"):
            feed = self._feed(progress=progress)
            reached = self._read(feed if checkpoint is None else checkpoint.rest(feed, state), classes)
        state.merge_ranks(self.share)
        _check_classes(state.sampler, state.totals)
        self.objective.check_reached(state.totals, in_any(reached))

    def _feed(self, *, progress: bool) -> Iterator[Numbered]:
        """The inputs and targets of every batch, as the model takes them, on the device, under a progress bar."""
        rank, size = rank_and_size()
        total = length_of(self.share.loader) if self.share.most is None else None
        total = total and len(range(rank, total, size))
        with progress_bar(shown=progress and not rank) as bar:
            for index, (first, inputs, targets) in enumerate(bar.track(self.share, total, description="scoring")):
                with blaming(f"moving to {self.device}", f"batch {index}"):
                    moved = batch_to_device((self.objective.fitted(inputs), targets), self.device)
                yield first, *moved

    def _read(self, feed: Iterable[Numbered], classes: Classes | None) -> bool:
        """Sum the gates' gradients, while the probes take samples; returns whether a loss depended on a gate."""
        sampler, reached = self.state.sampler, False
        weights: list[Tensor] = [probe.weight for probe in self.state.probes]
        for first, inputs, targets in feed:
            index, samples = sampler.batch, sample_count(inputs) if self.objective.counts_rows else None
            if sampler.compares:
                labels = class_of_samples(targets, samples, classes)
                samples = count = len(labels)
                sampler.choose(labels, first)
            else:
                count = samples or count_of(inputs, targets)
                sampler.count(count, first)
            value, output = self.objective.value(inputs, targets, samples, index)
            of = self.objective.run or self.objective.loss
            self.state.original.add(value * count, output, targets, of)
            with blaming("the backward pass", f"batch {index}"):
                grads = _gradients(value * count, weights)
            for total, grad in zip(self.state.totals, grads, strict=True):
                if grad is not None:
                    total.add_(grad)
                    reached = True
            sampler.bound()
        return reached


def _gradients(value: Tensor, weights: list[Tensor]) -> list[Tensor | None]:
    """The gradients of a batch's summed loss by the gates, in float64 on the CPU; None for gates that it misses."""
    if not weights or not value.requires_grad:
        return [None] * len(weights)
    grads: Sequence[Tensor | None] = torch.autograd.grad(value, weights, allow_unused=True)
    return [None if grad is None else grad.double().cpu() for grad in grads]


def _check_classes(sampler: Sampler, totals: list[Tensor]) -> None:
    """Raise where there are no two classes to compare."""
    if sampler.compares and len(sampler.counts) < 2 and totals:
        which = f"of one class ({next(iter(sampler.counts))})" if sampler.counts else "left out by a negative class"
        raise CalibrationError(
            f"all {sampler.seen} samples of the loader are {which}; the U-Score compares classes, and leaves negative "
            "ones out: give samples of at least two, or pass classes="
        )
