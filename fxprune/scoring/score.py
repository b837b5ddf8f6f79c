"""Scoring: one forward and one backward pass over the loader gives what the signals rank the units by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.batches import Classes, Unpack
from fxprune.caller.isolation import device_of, placed, precise, seeded
from fxprune.caller.ranks import check_same, rank_and_size
from fxprune.caller.tensors import fingerprint
from fxprune.coupling.collector import Exclude
from fxprune.coupling.couple import analyse
from fxprune.coupling.interpreter import Unknown
from fxprune.errors import stage
from fxprune.scoring.evidence import evidence_of
from fxprune.scoring.loader_pass import ScoringPass
from fxprune.scoring.objective import Loss
from fxprune.scoring.resuming import PassCheckpoint
from fxprune.scoring.sampler import Sampler
from fxprune.scoring.scores import Scores, scores_of
from fxprune.scoring.signals.table import Signal, name_of_signal, ranked
from fxprune.tracing.part import Run, name_of, part_of, with_captured_part


def score(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    propose: str | Signal = "reconstruction",
    protect: str | Signal = "taylor-by-sample",
    samples_per_class: int = 32,
    projections: int = 64,
    max_classes: int | None = None,
    max_samples: int | None = None,
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
    the losses of the samples depend on most to first order ("taylor-by-sample", arXiv 1611.06440, eq. 8). The R-Score
    of arXiv 2508.02291 is "taylor", the same of the loss of all samples. Its U-Score is "separability": the largest
    class-to-class 1-Wasserstein distance of a unit's activations, sliced over seeded directions for maps and
    sequences; it alone needs classes. All are taken where a unit is read, and summed over the places where it is.

    Args:
        model: a trained model, or a graph from `capture`; it is not changed.
        loader: re-iterable; batches are (inputs, targets), ((in1, in2), targets), or dicts with a "labels", "label",
            "targets" or "target"; `unpack` turns any other batch into (inputs, targets).
        loss: callable(output, target) -> mean over the batch, a scalar; cross-entropy by default.
        propose, protect: "separability", "magnitude", "activation", "taylor", "taylor-by-sample", "reconstruction" or
            "random"; or a function from `Evidence` to one number a unit. The lowest go first, the highest are kept.
        samples_per_class: how many samples of each class the U-Score compares: the first ones of the loader; of
            positions with classes, as many from the whole loader, drawn by `seed`.
        projections: directions of the sliced distance.
        max_classes: of more classes than this, so many are drawn, by `seed`.
        max_samples: score no further batch of the loader once there were so many samples. Without it, a loader that has
            no length may give 10,000 batches at most.
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
    check(score, locals())
    samples_per_class, projections, sample_memory, seed = map(
        int, (samples_per_class, projections, sample_memory, seed)
    )
    options = {"inexact": inexact, "head_dim": head_dim}
    with stage("scoring"), seeded(seed), precise():
        whole = with_captured_part(model, loader, submodule, exclude, unpack=unpack, run=run)
        graph: Any = part_of(whole, submodule)
        if rank_and_size()[1] > 1:
            told = f"one whose weights and buffers have the checksum {fingerprint(whole):08x}"
            check_same("the model", told, "load the same weights on all ranks")
        coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
        compares = "separability" in (propose, protect)
        sampler = Sampler(samples_per_class, max_classes, sample_memory, projections, seed, compares)
        made = {
            "seed": seed, "submodule": submodule, "samples_per_class": samples_per_class, "projections": projections,
            "max_classes": max_classes and int(max_classes), "sample_memory": sample_memory,
            "compares": compares,
        }  # fmt: skip
        place = torch.device(device) if device is not None else device_of(graph)
        with placed(place, graph):
            one = ScoringPass.through(
                whole, submodule, name_of(model, submodule), coupling, sampler, loader,
                loss=loss, unpack=unpack, run=run, device=place, most=max_samples,
            )  # fmt: skip
            file = None
            if checkpoint is not None:
                made |= {"model": fingerprint(whole), "edges": one.state.edges()}
                file = PassCheckpoint.at(checkpoint, every, made)
            totals = one.run(classes, file, progress=progress)
        evidence = evidence_of(graph, coupling, one.state.probes, totals, sampler)
        scores = ranked(propose, evidence), ranked(protect, evidence)
        about = {"samples": sampler.seen, "propose": name_of_signal(propose), "protect": name_of_signal(protect)}
        result = scores_of(graph, coupling, scores, options | {"submodule": submodule}, about | _sampled(sampler))
    if file is not None:
        file.path.unlink(missing_ok=True)
    return replace(result, moments=evidence.moments, min_keep=int(min_keep), round_to=int(round_to))


def _sampled(sampler: Sampler) -> dict[str, int]:
    """The seed, and where classes were compared, how many, on how many samples and directions."""
    if not sampler.compares:
        return {"seed": sampler.seed}
    return {
        "seed": sampler.seed, "classes": len(sampler.counts), "samples_per_class": sampler.per_class,
        "projections": sampler.projections,
    }  # fmt: skip
