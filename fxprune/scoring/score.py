"""Scoring: one forward and one backward pass over the loader, and the ranking of the units by signals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.batches import Classes, Unpack
from fxprune.caller.isolation import device_of, full_float32, on_device, seeded
from fxprune.caller.ranks import check_same, rank_and_size
from fxprune.caller.tensors import fingerprint
from fxprune.coupling.collector import Exclude
from fxprune.coupling.couple import analyse
from fxprune.coupling.interpreter import Unknown
from fxprune.coupling.kinds import BRANCHES
from fxprune.errors import stage
from fxprune.planning.allocation import RoundTo, blocks_of
from fxprune.scoring.divergence import Metric
from fxprune.scoring.evidence import Evidence, evidence_of, usage_of_experts
from fxprune.scoring.loader_pass import ScoringPass
from fxprune.scoring.objective import Loss
from fxprune.scoring.original import warn_near_chance
from fxprune.scoring.resuming import PassCheckpoint
from fxprune.scoring.sampler import Sampler
from fxprune.scoring.scores import Scores, scores_of
from fxprune.scoring.signals.table import Signal, name_of_signal, ranked
from fxprune.scoring.wrong_targets import compares_classes
from fxprune.tracing.graph import captured_of, history_of
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
    query_heads: bool = False,
    min_keep: int = 1,
    round_to: RoundTo = 1,
    equal_blocks: bool = False,
    blocks: bool | str = False,
    metric: Metric | None = None,
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

    The model runs in eval mode. One signal proposes the units of each group for removal, another protects them. By
    default the units that the others replace best are proposed first ("reconstruction"), and the units on which the
    samples' losses depend most, to first order, are protected ("taylor-by-sample", arXiv 1611.06440, eq. 8). The
    R-Score of arXiv 2508.02291, "taylor", uses the loss of all samples together. Its U-Score, "separability", is the
    largest 1-Wasserstein distance between a unit's activations on two classes, sliced over seeded directions for maps
    and sequences; only this signal needs classes. All signals are measured where a unit is read, and summed over its
    readers.

    On the way, the model's mean loss is measured, and its accuracy where it gives logits (N, classes, *positions) for
    class numbers (N, *positions), negative ones left out: `about` of the scores has both.

    Args:
        model: a trained model, or a graph from `capture`; it is not changed.
        loader: re-iterable; batches are (inputs, targets), ((in1, in2), targets), or dicts with a "labels", "label",
            "targets" or "target"; `unpack` turns any other batch into (inputs, targets).
        loss: callable(output, target) -> mean over the batch, a scalar; cross-entropy by default.
        propose, protect: "separability", "magnitude", "activation", "taylor", "taylor-by-sample", "reconstruction" or
            "random"; or a function from `Evidence` to one number a unit. The lowest are removed first.
        samples_per_class: number of samples of each class that the U-Score compares: the first in the loader; where
            positions have classes, positions drawn from the whole loader by `seed`.
        projections: number of directions of the sliced distance.
        max_classes: the most classes that are compared; if there are more, this many are drawn by `seed`.
        max_samples: read no further batch after so many samples. Without it, a loader without a length may have 10,000
            batches at most.
        sample_memory: bytes for the stored samples; to stay below, the number of projections is halved as often as
            needed, then the number of samples per class.
        exclude: module names, glob patterns of names, or module types whose outputs are kept whole.
        unknown: "error", or "freeze" to keep all channels that an operation without a rule touches.
        inexact, head_dim, query_heads: see `couple`.
        min_keep, round_to, equal_blocks: defaults for the plans that are made of the scores, see `Scores.plan`.
        blocks: whether residual branches (an attention, an MLP, the inner branch of a block of a ResNet) can be removed
            whole, beside units of layers; "only" they where it is "only", and all widths are kept. Their curve is
            measured at once, see `Scores.with_curves`, on samples of the loader that are held out.
        metric: of that curve, see `compress`.
        classes: callable(targets) -> (samples,) integers, where the targets are not class numbers themselves; or the
            classes of positions, (samples, ...) integers: of steps, (N, T), or pixels, (N, H, W). Negative ones are
            left out. `fxprune.classes` has ready-made ones.
        submodule: path of the part to score, by the whole model's loss; `exclude` and all names are the part's own.
        run: callable(model, inputs, targets) -> mean loss of the batch, in place of loss(model(inputs), targets), for
            models that return their loss. It may change the mode of `model`, a copy in eval mode; the scored part stays
            in eval mode. `inputs` and `targets` are unchanged from the loader.
        seed: of the directions, of the sampled classes and positions, and of "random".
        device: where to run; the model's own device by default.
        progress: show a progress bar on a terminal.
        checkpoint: a file that is written after `every` so many batches, and removed at the end. Where it exists, the
            pass continues after those batches, with the same scores as without an interruption. It must be of the same
            model, options and loader; each of several ranks has its own.
        every: see `checkpoint`.

    Raises:
        CalibrationError: the loader is empty or one-shot, a batch has an unknown form, an activation, the loss or a
            gradient is not finite; where classes are compared, their labels have an unknown form or there is only one.

    Warns:
        FxpruneWarning: on 100 samples or more the model is not clearly more often right than guessing would be.
    """
    check(score, locals())
    samples_per_class, projections, sample_memory, seed = map(
        int, (samples_per_class, projections, sample_memory, seed)
    )
    options: dict[str, Any] = {"inexact": inexact, "head_dim": head_dim, "query_heads": query_heads, "blocks": ""}
    with stage("scoring"), seeded(seed), full_float32():
        whole = with_captured_part(model, loader, submodule, exclude, unpack=unpack, run=run)
        graph: Any = part_of(whole, submodule)
        options["blocks"] = (captured_of(graph).limits.blocks or BRANCHES) if blocks else ""
        _check_same_model(whole)
        coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
        compares = "separability" in (propose, protect)
        sampler = Sampler(samples_per_class, max_classes, sample_memory, projections, seed, compares)
        made = {
            "seed": seed, "submodule": submodule, "samples_per_class": samples_per_class, "projections": projections,
            "max_classes": max_classes and int(max_classes), "sample_memory": sample_memory, "compares": compares,
        }  # fmt: skip
        place = torch.device(device) if device is not None else device_of(graph)
        with on_device(place, graph):
            scoring = ScoringPass.through(
                whole, submodule, name_of(model, submodule), coupling, sampler, loader,
                loss=loss, unpack=unpack, run=run, device=place, most=max_samples,
            )  # fmt: skip
            file = None
            if checkpoint is not None:
                made |= {"model": fingerprint(whole), "edges": scoring.state.edges()}
                file = PassCheckpoint.at(checkpoint, every, made)
            scoring.run(classes, file, progress=progress)
        evidence = evidence_of(graph, coupling, scoring.state.probes, scoring.state.totals, sampler)
        scores = ranked(propose, evidence), ranked(protect, evidence)
        by_class = run is None and (loss is None or compares_classes(loss))
        about = {"samples": sampler.seen, "propose": name_of_signal(propose), "protect": name_of_signal(protect)}
        about |= {"seed": seed} | scoring.state.original.about(sampler.seen, by_class=by_class)
        about |= _about_experts_and_classes(evidence, sampler)
        result = scores_of(graph, coupling, scores, options | {"submodule": submodule}, about)
    if file is not None:
        file.path.unlink(missing_ok=True)
    warn_near_chance(about, by_class=by_class, pruned=bool(history_of(graph).plans))
    rounded = {kind: int(n) for kind, n in round_to.items()} if isinstance(round_to, Mapping) else int(round_to)
    result = replace(
        result, moments=evidence.moments, min_keep=int(min_keep), round_to=rounded, equal_blocks=bool(equal_blocks),
        blocks=blocks_of(blocks),
    )  # fmt: skip
    if not blocks:
        return result
    return result.with_curves(
        whole, loader, loss=loss, unpack=unpack, run=run, metric=metric, max_samples=max_samples, device=device,
        seed=seed,
    )  # fmt: skip


def _check_same_model(model: nn.Module) -> None:
    """Raise DistributedError where the ranks have models with different numbers."""
    if rank_and_size()[1] > 1:
        told = f"one whose weights and buffers have the checksum {fingerprint(model):08x}"
        check_same("the model", told, "load the same weights on all ranks")


def _about_experts_and_classes(evidence: Evidence, sampler: Sampler) -> dict[str, Any]:
    """Entries of `Scores.about`: the use of experts, if there are any, and what the U-Score compared, if it did."""
    about: dict[str, Any] = {}
    if usage := usage_of_experts(evidence.coupling, evidence.moments):
        about["experts"] = usage
    if sampler.compares:
        about |= {"classes": len(sampler.counts), "samples_per_class": sampler.per_class}
        about["projections"] = sampler.projections
    return about
