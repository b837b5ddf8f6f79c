"""The compiler: capture -> couple -> score -> allocate -> rewrite -> verify -> report (-> fine-tune)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.allocate import Allocate
from fxprune.batches import Classes, Unpack
from fxprune.budgets import given
from fxprune.capture import ModelGraph, capture_as, example_of
from fxprune.cost import macs, parameters
from fxprune.coupling import EXCLUDED, Coupling, Exclude
from fxprune.errors import FxpruneWarning
from fxprune.example import from_json
from fxprune.finetune import check_options
from fxprune.finetune import finetune as tune
from fxprune.isolation import device_of, undisturbed
from fxprune.objective import Loss
from fxprune.plan import Plan, coupling_of, kept_units
from fxprune.report import Report, frozen_reports, group_reports, report
from fxprune.rewrite import rewrite
from fxprune.rounds import Asked, Fit, in_rounds
from fxprune.scoring import score
from fxprune.submodule import Run, name_of, part_of, with_captured_part, with_part
from fxprune.tod import Flags
from fxprune.verify import verify as prove
from fxprune.walk import Unknown

Planned = tuple[ModelGraph, Coupling, Flags]


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    alpha: float | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    allocate: str | Allocate = "tod",
    rounds: int = 1,
    loss: Loss | None = None,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
    min_keep: int = 1,
    round_to: int = 1,
    verify: bool = True,
    unpack: Unpack | None = None,
    classes: Classes | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    submodule: str = "",
    run: Run | None = None,
    finetune: Mapping[str, Any] | None = None,
    **scoring: Any,
) -> nn.Module:
    """A physically smaller model that equals `model` with its least useful units zeroed.

    Args:
        model: a trained model; it comes back untouched in every respect.
        loader: a small labelled calibration loader, see `score`.
        alpha: tolerance of difference between what proposes units and what protects them; 0 prunes least, 1 most. 0.05
            where no budget is given either.
        params, macs, latency: budgets, as shares of what the original has, of which one may stand in place of alpha.
        allocate: how a level becomes widths, see `Scores.plan`.
        rounds: how often to score and prune. A budget is gone for in equal factors; alpha holds for each round anew.
        loss, unpack, classes, seed, device, progress, run, scoring: see `score`.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.
        inexact, head_dim: see `couple`.
        min_keep, round_to: see `Scores.plan`.
        submodule: path of the part to prune in place of the whole, for models that cannot be captured in one piece.
            Its outputs stay whole, so the rest of the model fits; `exclude` takes names in the part.
        verify: prove the result against the zero-masked original before it is handed over.
        finetune: arguments of `finetune`, at least train_loader and val_loader, to train the result with at the end;
            loss, unpack, run, seed, device and progress are those above where it does not name them. The proof, and the
            error in the report, are of the model before that.

    Returns:
        A `torch.fx.GraphModule` on the model's device, in its dtype and training mode, with its state_dict keys; with
        `submodule`, a copy of the whole model in which such a one stands in the part's place.

    Raises:
        FxpruneError: one of its children, from the stage that failed; see the stages.
    """
    shared = {"loss": loss, "unpack": unpack, "run": run, "seed": seed, "device": device, "progress": progress}
    if finetune is not None:
        check_options(finetune := shared | dict(finetune))
    asked: Asked = {"alpha": alpha, "params": params, "macs": macs, "latency": latency}
    given(**asked)

    def one(model: nn.Module, asked: Asked, fit: Fit) -> nn.Module:
        whole = with_captured_part(model, loader, submodule, exclude, unpack=unpack, run=run)
        scores = score(
            whole, loader, loss, exclude=exclude, unknown=unknown, inexact=inexact, head_dim=head_dim, unpack=unpack,
            classes=classes, seed=seed, device=device, progress=progress, submodule=submodule, run=run, **scoring,
        )  # fmt: skip
        scores = scores if latency is None else scores.with_latency(whole)
        plan = fit(scores.plan(**asked, allocate=allocate, min_keep=min_keep, round_to=round_to))
        small = apply(whole, plan)
        if verify:
            example: Any = example_of(part_of(whole, submodule))  # type: ignore[arg-type]
            _note_error(small, prove(whole, plan, small, example), submodule)
        return small

    whole = with_captured_part(model, loader, submodule, exclude, unpack=unpack, run=run)
    if rounds == 1:
        small = one(whole, asked, lambda plan: plan)
    else:
        outcome = in_rounds(whole, submodule, one, asked, rounds)
        small = outcome.small
        with undisturbed():
            _note(whole, small, outcome.plan, _planned(whole, outcome.plan), outcome.error)
    warn_if_unpruned(part_of(small, submodule))
    return small if finetune is None else tune(small, **finetune)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Rewrite `model`, or the part of it that the plan is for, by a plan; all was decided when the plan was made.

    Raises:
        PlanError: the plan does not fit the model.
        RewriteError: the graph cannot be rewritten.
    """
    with undisturbed():
        planned = _planned(model, plan)
        small = with_part(model, plan.submodule, rewrite(*planned))
        _note(model, small, plan, planned)
    return small


def _planned(model: nn.Module, plan: Plan) -> Planned:
    """The graph that a plan is for, its coupling, and the units that stay."""
    part = part_of(model, plan.submodule)
    graph = capture_as(plan.settings, part, from_json(plan.example, device=device_of(part)))
    coupling = coupling_of(graph, plan)
    return graph, coupling, kept_units(plan, coupling)


def _note(model: nn.Module, small: nn.Module, plan: Plan, planned: Planned, error: float | None = None) -> None:
    """Put the plan that leads from `model` to `small`, and its report, into `small`."""
    graph, coupling, keep = planned
    part: Any = part_of(small, plan.submodule)
    notes = replace(_report(graph, coupling, plan, part, keep), error=error)
    if plan.submodule:
        notes = replace(notes, model=name_of(model, plan.submodule), whole=(parameters(model), parameters(small)))
    part.meta["fxprune"] = {"plan": plan, "report": notes}


def _report(graph: ModelGraph, coupling: Coupling, plan: Plan, small: ModelGraph, keep: Any) -> Report:
    example, frozen = example_of(graph), plan.frozen or coupling.frozen()
    return Report(
        type(graph).__name__, plan.alpha,
        parameters(graph), parameters(small), macs(graph, example), macs(small, example), None,
        group_reports(coupling, keep, frozen.get(EXCLUDED, ())), frozen_reports(frozen),
        captured=graph.meta["fxprune"]["rung"], budget=plan.budget,
    )  # fmt: skip


def _note_error(small: nn.Module, error: float, submodule: str) -> None:
    part: Any = part_of(small, submodule)
    part.meta["fxprune"]["report"] = replace(part.meta["fxprune"]["report"], error=error)


def warn_if_unpruned(small: nn.Module) -> None:
    """Say why nothing was pruned, where nothing was."""
    notes = report(small)
    if not notes.groups:
        reasons = (
            "; ".join(f"{', '.join(f.sites[:3])}: {f.reason}" for f in notes.frozen) or "it has no layers with channels"
        )
        warnings.warn(f"nothing in {notes.model} can be pruned: {reasons}", FxpruneWarning, stacklevel=3)
    elif notes.budget is None and all(group.before == group.after for group in notes.groups):
        warnings.warn(
            f"nothing was pruned from {notes.model} at alpha {notes.alpha}: no group has units that are low by U-Score "
            "without being high by R-Score; raise alpha",
            FxpruneWarning,
            stacklevel=3,
        )
