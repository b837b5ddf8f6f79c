"""What is handed over with a rewritten graph: the plan that led to it, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.capture import ModelGraph, capture_as, example_of
from fxprune.cost import macs, parameters
from fxprune.coupling import EXCLUDED, Coupling
from fxprune.example import from_json
from fxprune.isolation import device_of
from fxprune.numberless import home_of
from fxprune.plan import Plan, coupling_of, kept_units
from fxprune.provenance import provenance
from fxprune.report import Report, frozen_reports, group_reports
from fxprune.submodule import name_of, part_of
from fxprune.tod import Flags

Planned = tuple[ModelGraph, Coupling, Flags]


def planned_by(model: nn.Module, plan: Plan) -> Planned:
    """The graph that a plan is for, its coupling, and the units that stay."""
    part = part_of(model, plan.submodule)
    graph = capture_as(plan.settings, part, from_json(plan.example, device=home_of(device_of(part))))
    coupling = coupling_of(graph, plan)
    return graph, coupling, kept_units(plan, coupling)


def note(model: nn.Module, small: nn.Module, plan: Plan, planned: Planned, error: float | None = None) -> None:
    """Put the plan that leads from `model` to `small`, and its report, into `small`."""
    graph, coupling, keep = planned
    part: Any = part_of(small, plan.submodule)
    notes = replace(_report(graph, coupling, plan, part, keep), error=error)
    if plan.submodule:
        notes = replace(notes, model=name_of(model, plan.submodule), whole=(parameters(model), parameters(small)))
    old = part.meta.get("fxprune", {})
    before = old.get("report")
    notes = replace(notes, compensation=before.compensation if isinstance(before, Report) else None)
    made = {"plan": plan, "report": notes, "scores": old.get("scores")}
    part.meta["fxprune"] = made | provenance(graph, part, plan)


def _report(graph: ModelGraph, coupling: Coupling, plan: Plan, small: ModelGraph, keep: Any) -> Report:
    example, frozen = example_of(graph), plan.frozen or coupling.frozen()
    return Report(
        type(graph).__name__, plan.alpha,
        parameters(graph), parameters(small), macs(graph, example), macs(small, example), None,
        group_reports(coupling, keep, frozen.get(EXCLUDED, ())), frozen_reports(frozen),
        captured=graph.meta["fxprune"]["rung"], budget=plan.budget,
    )  # fmt: skip


def note_error(small: nn.Module, error: float, submodule: str) -> None:
    """Put the error that `verify` found into the report."""
    part: Any = part_of(small, submodule)
    part.meta["fxprune"]["report"] = replace(part.meta["fxprune"]["report"], error=error)


def note_scores(small: nn.Module, about: Mapping[str, Any], submodule: str) -> None:
    """Note how the scores were made that the plan came from."""
    part: Any = part_of(small, submodule)
    part.meta["fxprune"]["scores"] = dict(about)
