"""The compiler: capture -> couple -> score -> allocate -> rewrite -> verify -> report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.batches import Classes, Unpack, fitted_example
from fxprune.capture import ModelGraph, capture_around, capture_as, example_of
from fxprune.cost import macs, parameters
from fxprune.coupling import EXCLUDED, Coupling, Exclude, analyse
from fxprune.errors import FxpruneWarning
from fxprune.example import from_json
from fxprune.isolation import device_of, undisturbed
from fxprune.plan import Plan, kept_units
from fxprune.report import Report, frozen_reports, group_reports
from fxprune.rewrite import rewrite
from fxprune.scoring import Loss, score
from fxprune.verify import verify as prove
from fxprune.walk import Unknown


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    alpha: float = 0.05,
    *,
    loss: Loss | None = None,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    min_keep: int = 1,
    round_to: int = 1,
    verify: bool = True,
    unpack: Unpack | None = None,
    classes: Classes | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **scoring: Any,
) -> ModelGraph:
    """A physically smaller model that equals `model` with its least useful units zeroed, made in one pass.

    Args:
        model: a trained model; it comes back untouched in every respect.
        loader: a small labelled calibration loader, see `score`.
        alpha: tolerance of difference between what proposes units and what protects them; 0 prunes least, 1 most.
        loss, unpack, classes, seed, device, progress, scoring: see `score`.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.
        min_keep, round_to: see `Scores.plan`.
        verify: prove the result against the zero-masked original before it is handed over.

    Returns:
        A `torch.fx.GraphModule` on the model's device, in its dtype and training mode, with its state_dict keys.

    Raises:
        FxpruneError: one of its children, from the stage that failed; see the stages.
    """
    graph = capture_around(exclude, model, fitted_example(model, loader, unpack))
    scores = score(
        graph, loader, loss, exclude=exclude, unknown=unknown, unpack=unpack, classes=classes, seed=seed, device=device,
        progress=progress, **scoring,
    )  # fmt: skip
    plan = scores.plan(alpha, min_keep=min_keep, round_to=round_to)
    small = apply(graph, plan)
    if verify:
        _note_error(small, prove(graph, plan, small, example_of(graph)))
    warn_if_unpruned(small)
    return small


def apply(model: nn.Module, plan: Plan) -> ModelGraph:
    """Rewrite `model` by a plan; everything was decided when the plan was made.

    Raises:
        PlanError: the plan does not fit the model.
        RewriteError: the graph cannot be rewritten.
    """
    with undisturbed():
        example = from_json(plan.example, device=device_of(model))
        graph = capture_as(plan.settings, model, example)
        coupling = analyse(graph, unknown="freeze")
        keep = kept_units(plan, coupling)
        small = rewrite(graph, coupling, keep)
        small.meta["fxprune"] = {"plan": plan, "report": _report(graph, coupling, plan, small, keep)}
    return small


def _report(graph: ModelGraph, coupling: Coupling, plan: Plan, small: ModelGraph, keep: Any) -> Report:
    example, frozen = example_of(graph), plan.frozen or coupling.frozen()
    return Report(
        type(graph).__name__, plan.alpha,
        parameters(graph), parameters(small), macs(graph, example), macs(small, example), None,
        group_reports(coupling, keep, frozen.get(EXCLUDED, ())), frozen_reports(frozen),
    )  # fmt: skip


def _note_error(small: ModelGraph, error: float) -> None:
    notes = small.meta["fxprune"]
    notes["report"] = replace(notes["report"], error=error)


def warn_if_unpruned(small: ModelGraph) -> None:
    """Say why nothing was pruned, where nothing was."""
    notes: Report = small.meta["fxprune"]["report"]
    if not notes.groups:
        reasons = (
            "; ".join(f"{', '.join(f.sites[:3])}: {f.reason}" for f in notes.frozen) or "it has no layers with channels"
        )
        warnings.warn(f"nothing in {notes.model} can be pruned: {reasons}", FxpruneWarning, stacklevel=3)
    elif all(group.before == group.after for group in notes.groups):
        warnings.warn(
            f"nothing was pruned from {notes.model} at alpha {notes.alpha}: no group has units that are low by U-Score "
            "without being high by R-Score; raise alpha",
            FxpruneWarning,
            stacklevel=3,
        )
