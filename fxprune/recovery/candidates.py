"""Several plans of one budget: each is rewritten and compensated, and the one nearest to the original is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from fxprune.caller.isolation import undisturbed
from fxprune.errors import stage
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned, planned_by
from fxprune.reporting.attach import note, note_compensation, note_scores
from fxprune.reporting.records import Compensation
from fxprune.reporting.report import report
from fxprune.rewriting.rewrite import rewrite
from fxprune.scoring.scores import Scores
from fxprune.tracing.part import part_of, with_part


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A plan, the model `plain` that it made, and `small`, the same compensated."""

    plan: Plan
    planned: Planned
    plain: nn.Module
    small: nn.Module

    @property
    def compensation(self) -> Compensation | None:
        """How it was compensated."""
        return report(part_of(self.small, self.plan.submodule)).compensation

    @property
    def error(self) -> float:
        """The error on the samples that choose, inf where it was not measured."""
        done = self.compensation
        return done.chosen[1] if done and done.chosen else float("inf")


def rewritten(model: nn.Module, plan: Plan) -> tuple[nn.Module, Planned]:
    """The model rewritten by a plan, with its record; and the graph, coupling and kept units of the original."""
    with stage("rewriting"), undisturbed():
        found = planned_by(model, plan)
        small = with_part(model, plan.submodule, rewrite(*found))
        note(model, small, plan, found)
        return small, found


def nearest(
    model: nn.Module, plans: Mapping[str, tuple[Scores, Plan]], compensated: Callable[..., nn.Module]
) -> Candidate:
    """The candidate whose outputs are nearest to the original's on the samples that choose.

    Its report lists all of them, by their names. `compensated` is as `with_compensation`.
    """
    found = {}
    for name, (scores, plan) in plans.items():
        plain, planned = rewritten(model, plan)
        note_scores(plain, scores, plan)
        small = compensated(plan=plan, planned=planned, small=plain, scores=scores, final=len(plans) == 1)
        found[name] = Candidate(plan, planned, plain, small)
    chosen = min(found, key=lambda name: found[name].error)
    best = found[chosen]
    if len(found) > 1 and best.compensation is not None:
        parts = {"plan": best.plan, "planned": best.planned, "small": best.plain, "scores": plans[chosen][0]}
        best = replace(best, small=compensated(**parts))
        done, errors = best.compensation, {name: candidate.error for name, candidate in found.items()}
        if done is not None:
            note_compensation(best.small, replace(done, compared=errors), best.plan.submodule)
    return best
