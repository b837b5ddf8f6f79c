"""Attaching to a rewritten graph the plan that led to it and its report."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from fxprune.caller.batches import sample_count
from fxprune.caller.tensors import bytes_of
from fxprune.coupling.collector import EXCLUDED
from fxprune.errors import blaming
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.reporting.groups import (
    frozen_reports,
    group_reports,
    rankings,
    router_reports,
    site_widths,
    with_rankings,
    with_usage,
)
from fxprune.reporting.history import extended_history
from fxprune.reporting.layers import largest, layer_costs, layer_parameters
from fxprune.reporting.provenance import provenance_of
from fxprune.reporting.records import Calibration, Compensation
from fxprune.reporting.report import Pruned, Report, pruned_of, with_report
from fxprune.scoring.scores import Scores
from fxprune.tracing.facts import facts_on, parameters
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, example_of, flops_of
from fxprune.tracing.part import name_of, part_of


def note(model: nn.Module, small: nn.Module, plan: Plan, planned: Planned, error: float | None = None) -> None:
    """Attach to `small` the plan that leads from `model` to it, and its report."""
    part: Any = part_of(small, plan.submodule)
    before = pruned_of(part)
    report = replace(
        _report(planned, plan, part), error=error, compensation=before.report.compensation if before else None
    )
    if plan.submodule:
        report = replace(report, model=name_of(model, plan.submodule), whole=(parameters(model), parameters(small)))
    history = extended_history(planned.graph, part, plan)
    part.meta[RECORD] = Pruned(plan, report, history, before.scores if before else None)


def _report(planned: Planned, plan: Plan, small: ModelGraph) -> Report:
    graph, coupling, keep = planned
    example, frozen = example_of(graph), plan.frozen or coupling.frozen()
    samples = sample_count(example)
    before = layer_costs(graph, flops_of(graph), samples)
    with blaming("the rewritten model", "the example", ": keep more units, by a lower alpha or exclude="):
        after = layer_costs(small, facts_on(small, example).flops, samples)
    return Report(
        type(graph).__name__, plan.alpha,
        parameters(graph), parameters(small), before.total, after.total, None,
        group_reports(coupling, keep, frozen.get(EXCLUDED, ())), frozen_reports(frozen, graph, plan.submodule),
        captured=captured_of(graph).method, budget=plan.budget, layers=largest(before, after),
        weight_bytes=(bytes_of(graph), bytes_of(small)), widths=site_widths(coupling.sites, keep),
        routers=router_reports(coupling, keep),
    )  # fmt: skip


def note_call(small: nn.Module, call: str, loader: object, submodule: str) -> None:
    """Add to the report by which call and with which data the model was made, and when."""
    part: Any = part_of(small, submodule)
    with_report(part, provenance=provenance_of(call, loader, part.meta[RECORD].scores))


def note_command(small: nn.Module, submodule: str, **names: str | None) -> None:
    """Put the names on a command line into the provenance: the command as `call`, `model`, `weights` and `file`."""
    part: Any = part_of(small, submodule)
    with_report(part, provenance=replace(part.meta[RECORD].report.provenance, **names))


def note_error(small: nn.Module, error: float, submodule: str) -> None:
    """Add the error that `verify` found to the report."""
    with_report(part_of(small, submodule), error=error)


def calibration_of(scores: Scores) -> Calibration | None:
    """What scoring measured of the original; None where the scores do not come from data."""
    known = [field.name for field in fields(Calibration)]
    about = {name: value for name, value in scores.about.items() if name in known}
    return Calibration(**about) if "loss" in about else None


def note_original(small: nn.Module, scores: Scores, submodule: str) -> None:
    """Add to the report what scoring measured of the original."""
    with_report(part_of(small, submodule), calibration=calibration_of(scores))


def note_scores(small: nn.Module, scores: Scores, plan: Plan) -> None:
    """Record how the scores behind the plan were made, and how they ranked the units of every group."""
    part: Any = part_of(small, plan.submodule)
    part.meta[RECORD] = replace(part.meta[RECORD], scores=dict(scores.about))
    note_original(small, scores, plan.submodule)
    if all(plan.widths.get(site.name) == site.width for site in scores.sites):
        report: Report = part.meta[RECORD].report
        other = "random" if "random" in scores.about else "a score"
        signals = tuple(str(scores.about.get(name, other)) for name in ("propose", "protect"))
        with_report(
            part, groups=with_rankings(report.groups, rankings(scores, plan)), signals=signals,
            routers=with_usage(report.routers, scores),
        )  # fmt: skip


def note_compensation(small: nn.Module, done: Compensation, submodule: str) -> None:
    """Add the compensation to the report, and count the biases that it created."""
    part: Any = part_of(small, submodule)
    report: Report = part.meta[RECORD].report
    counts = layer_parameters(part)
    with_report(
        part, compensation=done, params_after=parameters(part),
        weight_bytes=report.weight_bytes and (report.weight_bytes[0], bytes_of(part)),
        whole=report.whole and (report.whole[0], parameters(small)),
        layers=tuple(replace(layer, params=(layer.params[0], counts[layer.name])) for layer in report.layers),
    )  # fmt: skip
