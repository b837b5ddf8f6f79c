"""Scoring: one forward and one backward pass over the loader gives what the signals rank the units by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx, nn

from fxprune.allocate import check_limits
from fxprune.batches import Classes, Unpack, class_of_samples, count_of, length_of, sample_count, to_device
from fxprune.capture import ModelGraph
from fxprune.checkpoint import fingerprint
from fxprune.coupling import Coupling, Exclude, analyse
from fxprune.distributed import check_same, rank_and_size, together
from fxprune.errors import CalibrationError, blaming, stage
from fxprune.gates import insert
from fxprune.isolation import device_of, dtype_of, evaluating, seeded
from fxprune.merging import merge
from fxprune.moments import Key, Moments
from fxprune.objective import Loss, Objective, Part
from fxprune.probes import Draw, Probe, Rows, rows_of
from fxprune.ranking import Evidence, Signal, check_names, name_of_signal, need_classes, ranked
from fxprune.resuming import Checkpoint, Found
from fxprune.sampling import Sampler
from fxprune.scores import Scalars, Scores, scores_of
from fxprune.shares import Numbered, Share
from fxprune.signals import separability
from fxprune.submodule import Run, name_of, part_of, with_captured_part, with_part
from fxprune.walk import Unknown


def score(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    propose: str | Signal = "reconstruction",
    protect: str | Signal = "taylor",
    samples_per_class: int = 32,
    projections: int = 64,
    max_classes: int | None = None,
    sample_memory: int = 1 << 30,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
    min_keep: int = 1,
    round_to: int = 1,
    unpack: Unpack | None = None,
    classes: Classes | None = None,
    submodule: str = "",
    run: Run | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 50,
) -> Scores:
    """Score every prunable unit of `model` in one pass over a small calibration loader.

    The model runs in eval mode. One signal ranks the units of each group for leaving, another protects them. By default
    those are proposed first whose loss the others can make up for best ("reconstruction"), and those are protected that
    the loss depends on most to first order ("taylor", the R-Score of arXiv 2508.02291). The paper's U-Score is
    "separability": the largest class-to-class 1-Wasserstein distance of a unit's activations, sliced over seeded
    directions for maps and sequences; it alone needs classes. All are taken where a unit is read, and summed over the
    places where it is.

    Args:
        model: a trained model, or a graph from `capture`; it is not changed.
        loader: re-iterable; batches are (inputs, targets), ((in1, in2), targets), or dicts with a "labels", "label",
            "targets" or "target"; `unpack` turns any other batch into (inputs, targets).
        loss: callable(output, target) -> mean over the batch, a scalar; cross-entropy by default.
        propose, protect: "separability", "magnitude", "activation", "taylor", "reconstruction" or "random"; or a
            function from `Evidence` to one number a unit. The lowest go first, the highest are protected.
        samples_per_class: how many samples of each class the U-Score compares: the first ones of the loader; of
            positions with classes, as many from the whole loader, drawn by `seed`.
        projections: directions of the sliced distance.
        max_classes: of more classes than this, so many are drawn, by `seed`.
        sample_memory: bytes that the stored samples may take; to stay below, the number of projections is halved, and
            where there is one, the number of samples of a class.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.
        inexact, head_dim: see `couple`.
        min_keep, round_to: of the plans that are made of the scores and not told others, see `Scores.plan`.
        classes: callable(targets) -> (samples,) integers, where the targets are not class numbers themselves; or the
            classes of positions, (samples, ...) integers: of steps, (N, T), or pixels, (N, H, W). Negative ones are
            left out. `fxprune.classes` has ready-made ones.
        submodule: path of the part to score, by the whole model's loss; `exclude` and all names are the part's own.
        run: callable(model, inputs, targets) -> mean loss of the batch, in place of loss(model(inputs), targets), for
            models that give their loss themselves. It may change the mode of `model`, a copy in eval mode; the part
            that is scored stays in eval mode. `inputs` and `targets` are those of the loader, as they are.
        seed: of the directions, of the sampled classes and positions, and of "random".
        device: where to run; the model's own device by default.
        progress: show a progress bar on a terminal.
        checkpoint: a file that is written after `every` so many batches, and removed at the end. Where it is there
            already, the pass goes on behind those batches, and gives the scores that it would have given at once. It
            is of the same model, options and loader, or an error; each of several ranks has one of its own.
        every: see `checkpoint`.

    Raises:
        CalibrationError: the loader is empty or one-shot, a batch has an unknown form, an activation, the loss or a
            gradient is not finite; where classes are compared, their labels have an unknown form or there is only one.
    """
    check_names(propose, protect)
    check_limits(min_keep, round_to)
    with stage("scoring"), seeded(seed):
        whole = with_captured_part(model, loader, submodule, exclude, unpack=unpack, run=run)
        graph: Any = part_of(whole, submodule)
        if rank_and_size()[1] > 1:
            check_same("the model", _weight_of(whole), "load the same weights on all ranks")
        options = {"inexact": inexact, "head_dim": head_dim}
        coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
        draw = Draw(torch.empty(0), projections, seed, moments=True)
        sampler = Sampler(samples_per_class, max_classes, sample_memory, draw, need_classes([propose, protect]))
        made = {
            "seed": seed, "submodule": submodule, "samples_per_class": samples_per_class, "projections": projections,
            "max_classes": max_classes, "sample_memory": sample_memory, "compares": sampler.compares,
        }  # fmt: skip
        home, place = device_of(graph), torch.device(device) if device is not None else device_of(graph)
        try:
            gated, probes = _gated(graph, coupling, sampler.draw, place, rows_of(graph))
            part = Part(gated, graph, name_of(model, submodule))
            objective = Objective(with_part(whole, submodule, part).to(place), part, loss or F.cross_entropy, run)
            share, found = Share(loader, unpack, objective.count), Found.by(probes, sampler)
            file = None
            if checkpoint is not None:
                made |= {"model": fingerprint(whole), "edges": found.edges()}
                file = Checkpoint.at(checkpoint, every, made)
            with evaluating(objective.whole), together("scoring"):
                feed = _feed(objective, share, place, progress=progress)
                _read(objective, feed if file is None else file.rest(feed, found), found, classes)
            totals = merge(probes, found.totals, sampler, share)
            _check(objective, totals, sampler)
        finally:
            graph.to(home)
        sums = _unit_sums(probes, totals, coupling.units)
        separable = _separabilities(probes, sampler, coupling.units) if sampler.compares else None
        evidence = Evidence(graph, coupling, sums, _moments(probes), separable, seed)
        scores = ranked(propose, evidence), ranked(protect, evidence)
    if file is not None:
        file.done()
    about = {
        "samples": sampler.seen,
        "propose": name_of_signal(propose),
        "protect": name_of_signal(protect),
        "seed": seed,
    }
    if sampler.compares:
        about |= {
            "classes": len(sampler.counts), "samples_per_class": sampler.per_class,
            "projections": sampler.draw.projections,
        }  # fmt: skip
    settings = options | {"submodule": submodule}
    result = scores_of(graph, coupling, scores, settings, about)
    return replace(result, moments=evidence.moments, min_keep=min_keep, round_to=round_to)


def _weight_of(model: nn.Module) -> str:
    """A number that tells a model from one with other weights."""
    total = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    return f"one whose weights have the sum {total:.9g}"


def _gated(
    graph: ModelGraph, coupling: Coupling, draw: Draw, place: torch.device, rows: Mapping[str, Rows | None]
) -> tuple[fx.GraphModule, list[Probe]]:
    """The graph on the device `place`, with a probe on every edge."""
    graph.to(place)
    dtype = dtype_of(graph)
    gated, gates = insert(graph, coupling, lambda edge: Probe(edge, draw, place, dtype, rows.get(edge.source, Rows())))
    return gated, [gate for gate in gates if isinstance(gate, Probe)]


def _feed(objective: Objective, share: Share, place: torch.device, *, progress: bool) -> Iterator[Numbered]:
    """The inputs and targets of every batch, as the model takes them, on the device, under a progress bar."""
    rank, size = rank_and_size()
    total = length_of(share.loader)
    total = total and len(range(rank, total, size))
    with Progress(console=Console(stderr=True), transient=True, disable=rank > 0 or not progress) as bar:
        for index, (first, inputs, targets) in enumerate(bar.track(share, total=total, description="scoring")):
            with blaming(f"moving to {place}", f"batch {index}"):
                moved = to_device(objective.fitted(inputs), place), to_device(targets, place)
            yield first, *moved


def _read(objective: Objective, feed: Iterable[Numbered], found: Found, classes: Classes | None) -> None:
    """The pass over the loader: sums the gradients of the gates, and leaves the samples in the probes."""
    probes, sampler = found.probes, found.sampler
    weights: list[Tensor] = [probe.weight for probe in probes]
    for first, inputs, targets in feed:
        index, samples = sampler.draw.batch, sample_count(inputs) if objective.counts_rows else None
        if sampler.compares:
            labels = class_of_samples(targets, samples, classes)
            samples, count = len(labels), len(labels)
            sampler.choose(labels, probes, first)
        else:
            count = samples or count_of(inputs, targets)
            sampler.count(count, first)
        value = objective.value(inputs, targets, samples, index)
        with blaming("the backward pass", f"batch {index}"):
            grads = _gradients(value * count, weights)
        for total, grad in zip(found.totals, grads, strict=False):
            total.add_(grad)
        sampler.bound(probes)


def _check(objective: Objective, totals: list[Tensor], sampler: Sampler) -> None:
    """Raise where there are no two classes to compare, or the loss does not reach what is scored."""
    if sampler.compares and len(sampler.counts) < 2 and totals:
        which = f"of one class ({next(iter(sampler.counts))})" if sampler.counts else "left out by a negative class"
        raise CalibrationError(
            f"all {sampler.seen} samples of the loader are {which}; the U-Score compares classes, and leaves negative "
            "ones out: give samples of at least two, or pass classes="
        )
    objective.check_reached(totals)


def _gradients(value: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The gradients of a batch's summed loss by the gates, in float64 on the CPU."""
    if not weights or not value.requires_grad:
        return []
    grads = torch.autograd.grad(value, weights, materialize_grads=True)
    return [grad.double().cpu() for grad in grads]


def _unit_sums(probes: list[Probe], totals: list[Tensor], units: int) -> Scalars:
    """The size of the gradients' sum over all positions of a unit on an edge, summed over the edges.

    What one reader gains and another loses does not cancel: compensation repairs each reader by itself.
    """
    sums = np.zeros(units + 1)
    for probe, total in zip(probes, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                f"a gradient on the edge {probe.reads} is not finite: look for overflow in the model or the loss"
            )
        own = np.zeros(units + 1)
        np.add.at(own, probe.units, total.numpy())
        sums += np.abs(own)
    return sums[:-1]


def _moments(probes: list[Probe]) -> dict[Key, Moments]:
    """The moments of every edge that saw activations."""
    found = {p.key: p.gathering.moments() for p in probes if p.gathering is not None and p.gathering.rows}
    for probe in probes:
        if probe.key in found and not np.isfinite(found[probe.key].covariance).all():
            raise CalibrationError(
                f"an activation on the edge {probe.reads} is not finite: look for overflow in the model"
            )
    return found


def _separabilities(probes: list[Probe], sampler: Sampler, units: int) -> Scalars:
    """The U-Score of each unit, summed over the edges that read it."""
    result = np.zeros(units)
    compared = torch.tensor(sorted(sampler.counts), dtype=torch.int64)
    for probe in probes:
        if not probe.samples:  # it reads through a weight, and sees no activations
            continue
        samples, labels = probe.stored()
        chosen = torch.isin(labels, compared)
        found = separability(samples[chosen], labels[chosen]).double().numpy()
        if not np.isfinite(found).all():
            raise CalibrationError(
                f"an activation on the edge {probe.reads} is not finite: look for overflow in the model"
            )
        result[probe.own] += found
        probe.samples.clear()
        probe.labels.clear()
    return result
