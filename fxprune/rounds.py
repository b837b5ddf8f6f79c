"""Pruning in several rounds: each scores and prunes what the one before left, and one plan says it all in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np

from fxprune.caller.arrays import Flags
from fxprune.caller.source_lines import warn
from fxprune.coupling.groups import Coupling
from fxprune.errors import PlanError, UnreachableError
from fxprune.planning.budgets import ROUNDS, percentages
from fxprune.planning.plan import BUDGETS, Budget, Plan, coupling_of
from fxprune.planning.ratios import Ratios
from fxprune.reporting.report import Report
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import ModelGraph

ROUNDING = 1e-9
Asked = Mapping[str, float | None]


class Schedule:
    """What each of several rounds is asked for, and the one plan that leads from the original to their result.

    A budget is met in equal factors: after round i of n, budget ** (i / n) of it remains. An alpha holds for each round
    anew. `plan` is the composed plan so far, `error` the largest error that `verify` found, None where it did not run.
    """

    def __init__(self, asked: Asked, rounds: int) -> None:
        self.asked, self.rounds = asked, rounds
        self.what, self.goal = next(((name, asked[name] or 1) for name in BUDGETS if asked.get(name)), ("", 1.0))
        self.remaining, self.plan, self.error = 1.0, cast("Plan | None", None), cast("float | None", None)

    @contextmanager
    def round(self, index: int) -> Iterator[Asked]:
        """What round `index`, counted from 0, is asked for; a PlanError in it names the round."""
        if self.rounds == 1:
            yield self.asked
            return
        share = self.goal ** ((index + 1) / self.rounds)
        try:
            yield {**self.asked, self.what: min(1.0, share / self.remaining)} if self.what else self.asked
        except PlanError as error:
            left = f"which should leave {percentages(share, 1.0)[0]} of the original's {BUDGETS.get(self.what)}"
            where = f"round {index + 1} of {self.rounds}, {left if self.what else 'of the level given'}"
            if isinstance(error, UnreachableError):
                others = [remedy for remedy in error.remedies if remedy != ROUNDS and not remedy.startswith("raise ")]
                raised = [*others, f"raise {self.what}={self.goal:g}"]
                raise UnreachableError(f"{where}: {error.asked}", raised) from error
            raise PlanError(f"{where}: {error}") from error

    def check(self, scores: Scores) -> None:
        """Raise UnreachableError where no number of rounds meets a budget for which layers alone get narrower."""
        if self.what and self.rounds > 1 and not scores.blocks:
            budget: dict[str, Any] = {self.what: self.goal}
            scores.plan(**budget, allocate="uniform")

    def shares_of(self, ratios: Ratios | None) -> Ratios | None:
        """The ratios of one round, which all rounds together make those given."""
        return ratios and {layer: 1 - (1 - share) ** (1 / self.rounds) for layer, share in ratios.items()}

    def fitted(self, plan: Plan, original: ModelGraph) -> Plan:
        """A later round's plan that also keeps the channels that are tied to kept ones in the original alone.

        (The remaining model may be less coupled: where attention has one head, single places of it can be removed.)
        """
        if self.plan is None:
            return plan
        coupling = coupling_of(original, self.plan)
        stays = _stays(coupling, composed(self.plan, plan))
        keep = dict(plan.keep)
        for site in coupling.sites:
            if site.name in keep:
                units = site.units[list(self.plan.keep[site.name])]
                keep[site.name] = tuple(np.flatnonzero(np.append(stays, True)[units]).tolist())
        return replace(plan, keep=keep)

    def add(self, plan: Plan, done: Report) -> None:
        """Take in the plan of a round, and its report."""
        self.plan = plan if self.plan is None else composed(self.plan, plan)
        if done.error is not None:
            self.error = max(done.error, self.error or 0.0)
        self.remaining *= _share_left(done, self.what)

    def whole(self) -> Plan:
        """The plan from the original to the result, once all rounds are added.

        Warns:
            FxpruneWarning: more remains than was asked for, because what could be removed is tied in the original.
        """
        plan = cast("Plan", self.plan)
        if not self.what:
            return plan
        budget = Budget(self.what, self.goal, self.remaining)
        if self.remaining > self.goal + ROUNDING:
            warn(f"{budget}: the channels that could still be removed are tied to kept ones in the original")
        return replace(plan, budget=budget, alpha=None)


def _share_left(notes: Report, what: str) -> float:
    """The share of the budgeted quantity that one round left."""
    if what == "params":
        return notes.params_after / max(notes.params_before, 1)
    if what == "macs":
        return notes.macs_after / max(notes.macs_before, 1)
    return notes.budget.achieved if notes.budget else 1.0


def composed(first: Plan, second: Plan) -> Plan:
    """The plan that keeps what `second` keeps of what `first` keeps.

    Raises PlanError where `second` is not for the model that `first` leads to.

    >>> composed(Plan({"a": (1, 4, 6)}, {"a": 8}, None), Plan({"a": (0, 2)}, {"a": 3}, None)).keep
    {'a': (1, 6)}
    """
    for site, kept in second.keep.items():
        there = len(first.keep.get(site, range(second.widths[site])))
        if second.widths[site] != there or (site not in first.keep and len(kept) < there):
            raise PlanError(
                f"the second plan is for {second.widths[site]} channels of {site!r}, of which the first keeps "
                f"{len(first.keep.get(site, ()))}: make it for the model that the first leads to"
            )
    keep = {
        site: tuple(kept[index] for index in second.keep.get(site, range(len(kept))))
        for site, kept in first.keep.items()
    }
    return replace(first, keep=keep)


def _stays(coupling: Coupling, plan: Plan) -> Flags:
    """The units of which the plan keeps at least one channel."""
    stays = np.zeros(coupling.units, dtype=bool)
    for site in coupling.sites:
        units = site.units[list(plan.keep.get(site.name, range(site.width)))]
        stays[units[units >= 0]] = True
    return stays
