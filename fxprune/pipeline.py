"""The compiler: capture -> couple -> score -> allocate -> rewrite -> verify -> compensate -> report (-> fine-tune)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.batches import Classes, Unpack
from fxprune.caller.isolation import undisturbed
from fxprune.caller.source_lines import warn
from fxprune.coupling.branch_units import WHOLE
from fxprune.coupling.collector import Exclude
from fxprune.coupling.interpreter import Unknown
from fxprune.errors import PlanError, stage
from fxprune.planning.allocation import MEASURED, Allocate, RoundTo
from fxprune.planning.budgets import given, nothing_prunable
from fxprune.planning.plan import BUDGETS, Plan
from fxprune.planning.planned import planned_by
from fxprune.planning.ratios import Ratios
from fxprune.recovery.candidates import nearest, rewritten
from fxprune.recovery.compensate import COMPARED, Level, check_level, is_light, with_compensation
from fxprune.recovery.finetune import check_options
from fxprune.recovery.finetune import finetune as tune
from fxprune.reporting.attach import note, note_call, note_compensation, note_error, note_original, note_scores
from fxprune.reporting.provenance import call_of
from fxprune.reporting.report import note_in_class, report
from fxprune.rewriting.class_limits import keep_to, limits_of
from fxprune.rewriting.own_class import narrowed
from fxprune.rewriting.proof import error_of
from fxprune.rounds import Asked, Schedule
from fxprune.scoring.divergence import Metric
from fxprune.scoring.objective import Loss
from fxprune.scoring.score import score
from fxprune.scoring.scores import Scores
from fxprune.scoring.signals.table import Signal
from fxprune.tracing.graph import ModelGraph, captured_of
from fxprune.tracing.part import Run, part_of, with_captured_part, with_part


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    alpha: float | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    ratios: Ratios | None = None,
    allocate: str | Allocate | None = None,
    rounds: int = 1,
    compensate: Level = "sequential",
    new_biases: bool = True,
    propose: str | Signal = "reconstruction",
    protect: str | Signal = "taylor-by-sample",
    loss: Loss | None = None,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
    query_heads: bool = False,
    min_keep: int = 1,
    round_to: RoundTo = 1,
    equal_blocks: bool = False,
    blocks: bool | str = False,
    max_samples: int | None = None,
    verify: bool = True,
    unpack: Unpack | None = None,
    classes: Classes | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    submodule: str = "",
    run: Run | None = None,
    metric: Metric | None = None,
    finetune: Mapping[str, Any] | None = None,
    own_class: bool = False,
    **scoring: Any,
) -> nn.Module:
    """Remove the least useful units of `model`, and refit the remaining layers to make up for them.

    The rewritten model is proven equal to the original with those units zeroed, before weights are changed in closed
    form.

    Args:
        model: a trained model; it is not changed in any respect.
        loader: a small labelled calibration loader, see `score`.
        alpha: tolerance of difference between the signal that proposes units and the one that protects them; 0 prunes
            least, 1 most; 0.05 where neither a budget nor ratios are given.
        params, macs, latency: budgets, as shares of the original's; one of them may be given instead of alpha.
        ratios: by layer, the share of its units to remove: {"layer1.0.conv1": 0.5, "layer2.*": 0.25}; see
            `Scores.plan`. The other layers lose what alpha or a budget says, and nothing where neither is given.
        allocate: how a level becomes widths, see `Scores.plan`.
        propose, protect: the signals that rank the units, see `score`.
        compensate: "none", "bias" (removed channels are replaced by their means), "ridge" (by a linear map of the kept
            ones) or "sequential" (every later layer is refitted to the original's values, front to back). See `apply`.
        new_biases: whether a layer without a bias may get one from that; otherwise the result has the tensors of the
            model, narrower, and no others.
        rounds: how often to score and prune. A budget and ratios are met in equal factors; alpha holds for each round
            anew.
        max_samples, loss, unpack, classes, seed, device, progress, run, scoring: see `score`.
        exclude: module names, glob patterns of names, or module types whose outputs are not pruned.
        unknown: "error", or "freeze" to keep all channels that an operation without a rule touches.
        inexact, head_dim, query_heads: see `couple`.
        blocks: whether residual branches (an attention, an MLP, the inner branch of a block of a ResNet) can be removed
            whole, beside units of layers, within a budget; "only" they where it is "only". With `own_class`, these are
            whole blocks: entries of an `nn.ModuleList`, which gets shorter.
        min_keep, round_to, equal_blocks: see `Scores.plan`.
        submodule: path of the part to prune instead of the whole model, where that cannot be captured in one piece.
            The part's outputs are not pruned, so the rest of the model fits; `exclude` takes names in the part.
        verify: compare the captured graph with `model`, on two batches of the loader, before anything is decided, and
            prove the result against the zero-masked original before it is handed over.
        metric: callable(original, pruned) -> a number, 0 for equal outputs of the two on some samples and larger the
            more is lost, to judge by; by default the Kullback-Leibler divergence of classes (of logits and
            distributions), and the squared error of other outputs, in shares of their variance.
        finetune: arguments of `finetune`, at least train_loader and val_loader, to train the result with at the end;
            loss, unpack, run, seed, device and progress are those above where it does not name them. The proof and its
            error in the report are of the model before training.
        own_class: return a copy of the model of its own class, see `narrow`. What its code does not run narrower is
            kept whole, and the report says why.

    Returns:
        A `torch.fx.GraphModule` on the model's device, in its dtype and training mode, with its state_dict keys; with
        `submodule`, a copy of the whole model that holds such a graph in place of the part. With `own_class`, a model
        of the model's class.

    Raises:
        FxpruneError: one of its children, from the stage that failed; see the stages.
    """
    check(compress, locals(), passed_to=score)
    call = call_of(compress, locals())
    shared = {"loss": loss, "unpack": unpack, "run": run, "seed": seed, "device": device, "progress": progress}
    if finetune is not None:
        check_options(finetune := shared | dict(finetune))
    asked: Asked = {"alpha": alpha, "params": params, "macs": macs, "latency": latency}
    check_asked(asked, blocks)
    check_level(compensate, None, loader)
    captured = partial(
        with_captured_part, loader=loader, path=submodule, exclude=exclude, unpack=unpack, run=run, prove=verify
    )
    original = small = captured(model)
    coupled: Any = {
        "exclude": exclude, "unknown": unknown, "inexact": inexact, "head_dim": head_dim, "query_heads": query_heads
    }  # fmt: skip
    traced: Any = part_of(original, submodule)
    pieces = WHOLE if blocks else ""
    known = captured_of(traced).limits
    limits = limits_of(part_of(model, submodule), traced, **coupled, blocks=pieces) if own_class else known
    schedule = Schedule(asked, rounds)
    for index in range(rounds):
        whole = captured(small, prove=verify and not index)  # the one that there is, in the first round
        graph: Any = part_of(whole, submodule)
        keep_to(graph, limits)
        scores = score(
            whole, loader, loss, **coupled, unpack=unpack, classes=classes, seed=seed, device=device,
            progress=progress, submodule=submodule, run=run, propose=propose, protect=protect,
            max_samples=max_samples, min_keep=min_keep, round_to=round_to, equal_blocks=equal_blocks,
            blocks=blocks, metric=metric, **scoring,
        )  # fmt: skip
        scores = scores if latency is None else scores.with_latency(whole)
        if index == 0:
            first = scores
            schedule.check(first)
        with schedule.round(index) as target:
            measured = partial(
                scores.with_curves, whole, loader, loss=loss, unpack=unpack, run=run, metric=metric,
                max_samples=max_samples, device=device, seed=seed,
            )  # fmt: skip
            wanted: Any = {**target, "ratios": schedule.shares_of(ratios)}
            found = ways(scores, graph, wanted, allocate, compensate, measured)
            plans = {name: (source, schedule.fitted(plan, traced)) for name, (source, plan) in found.items()}
            best = nearest(
                whole, plans,
                partial(
                    with_compensation, whole, loader=loader, level=compensate, unpack=unpack, run=run,
                    seed=seed, device=device, max_samples=max_samples, by_class=loss is None and run is None,
                    metric=metric, new_biases=new_biases,
                ),
            )  # fmt: skip
            plan, small = best.plan, best.small
            if verify:
                note_error(small, error_of(plan, best.planned, part_of(best.plain, submodule)), submodule)
        schedule.add(plan, report(part_of(small, submodule)))
    if rounds > 1:
        plan = schedule.whole()
        with undisturbed():
            note(original, small, plan, planned_by(original, plan), schedule.error)
            note_original(small, first, submodule)
            done = report(part_of(small, submodule)).compensation
            if done is not None:  # its errors are those of the last round alone, beside the model that it began with
                note_compensation(small, replace(done, before=None, after=None, compared={}), submodule)
    note_call(small, call, loader, submodule)
    warn_if_unpruned(part_of(small, submodule))
    if own_class:
        small = in_own_class(model, plan, original, small)
    return small if finetune is None else tune(small, **finetune)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    scores: Scores | None = None,
    loader: Iterable[Any] | None = None,
    compensate: Level = "none",
    new_biases: bool = True,
    unpack: Unpack | None = None,
    run: Run | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Rewrite `model`, or the part of it that the plan is for, by a plan.

    Args:
        plan: from `Scores.plan`.
        scores: what `score` gave: "bias" and "ridge" work with its moments, and "sequential" does for recurrent layers.
            The report shows how they ranked the units.
        loader: calibration batches, whose targets are not looked at. "sequential" fits layers to them. A fifth of the
            samples is held out, and a step is kept only where it brings the outputs there nearer to the original's.
        compensate: "none" is the plain removal that `verify` proves; "bias", "ridge" and "sequential" make up for
            removed units in closed form (docs/compensation.md).
        new_biases: see `compress`.
        unpack, run, device: see `score`.
        metric: see `compress`.
        seed: of the positions that "sequential" samples.

    Raises:
        PlanError: the plan does not fit the model, or scores or loader are missing.
        RewriteError: the graph cannot be rewritten.
    """
    check(apply, locals())
    call = call_of(apply, locals())
    small, planned = rewritten(model, plan)
    if scores is not None:
        note_scores(small, scores, plan)
    small = with_compensation(
        model, plan, planned, small, scores, loader, compensate, unpack=unpack, run=run, seed=seed, device=device,
        metric=metric, new_biases=new_biases,
    )  # fmt: skip
    note_call(small, call, loader, plan.submodule)
    return small


def check_asked(asked: Asked, blocks: bool | str) -> None:  # noqa: FBT001 - the argument of compress
    """Raise PlanError where several levels and budgets are given, or branches can be removed without a budget."""
    given(**asked)
    if blocks and all(asked[name] is None for name in BUDGETS):
        raise PlanError(f"blocks={blocks!r} removes branches within a budget: give params=, macs= or latency=")


def ways(
    scores: Scores,
    graph: ModelGraph,
    wanted: Mapping[str, Any],
    allocate: str | Allocate | None,
    compensate: Level,
    measured: Callable[[], Scores],
) -> dict[str, tuple[Scores, Plan]]:
    """The plans to choose from, with the scores that they come from: several for a budget, of a graph that is light."""
    compares = allocate is None and any(wanted[budget] is not None for budget in BUDGETS)
    if (compares or allocate == MEASURED) and scores.curves is None:
        scores = measured()
    light = is_light(graph, min(scores.about["samples"], COMPARED))
    if compares and compensate != "none" and scores.curves is not None and light:
        return scores.candidates(**wanted)
    return {"": (scores, scores.plan(**wanted, allocate=allocate))}


def in_own_class(model: nn.Module, plan: Plan, original: nn.Module, small: nn.Module) -> nn.Module:
    """`model` narrowed in its own class to a graph that was made of `original`, the captured one, by a plan."""
    with stage("narrowing"), undisturbed():
        graph = part_of(small, plan.submodule)
        own = narrowed(part_of(model, plan.submodule), plan, planned_by(original, plan), graph)
        note_in_class(own, graph)
        return with_part(model, plan.submodule, own)


def warn_if_unpruned(small: nn.Module) -> None:
    """Warn where nothing was pruned, and say why."""
    notes = report(small)
    if not notes.groups:
        warn(nothing_prunable(notes.model, ((whole.sites, whole.reason) for whole in notes.frozen)))
    elif notes.alpha is None and notes.budget is None and all(g.before == g.after for g in notes.groups):
        warn(f"nothing was pruned from {notes.model}: every one of ratios= comes to less than half a unit; raise them")
    elif notes.budget is None and all(group.before == group.after for group in notes.groups):
        warn(
            f"nothing was pruned from {notes.model} at alpha {notes.alpha}: no group has units that are proposed "
            "and not protected; raise alpha"
        )
