"""Pruning in several rounds: each scores and prunes what the one before left, and one plan says it all in the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fxprune.caller.arrays import Flags
from fxprune.coupling.groups import Coupling
from fxprune.errors import FxpruneWarning, PlanError
from fxprune.planning.plan import BUDGETS, Budget, Plan, coupling_of
from fxprune.reporting.report import Report, report
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.part import part_of

ROUNDING = 1e-9
Asked = Mapping[str, float | None]
Fit = Callable[[Plan], Plan]
Round = Callable[[nn.Module, Asked, Fit], nn.Module]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The model after the last round, the plan that leads to it from the original, and verify's largest error."""

    small: nn.Module
    plan: Plan
    error: float | None


def in_rounds(whole: nn.Module, submodule: str, one: Round, asked: Asked, rounds: int) -> Outcome:
    """Prune `whole` in rounds. A budget is gone for in equal factors: round i of n leaves budget ** (i / n) of it.

    `one` prunes a model once, by what was asked for, after a function has fitted its plan to the original.

    Warns:
        FxpruneWarning: more is left than was asked for, since what may go of what was left is tied in the original.
    """
    what, goal = next(((name, asked[name] or 1) for name in BUDGETS if asked.get(name)), ("", 1.0))
    small, left, errors = whole, 1.0, list[float]()
    so_far: Plan | None = None
    graph: Any = part_of(whole, submodule)
    for index in range(1, rounds + 1):
        target = {what: min(1.0, goal ** (index / rounds) / left)} if what else {}
        try:
            small = one(small, {**asked, **target}, _fit(graph, so_far))
        except PlanError as error:
            share = goal ** (index / rounds)
            said = f"which should leave {share:.1%} of the original's {BUDGETS[what]}" if what else "of the level given"
            raise PlanError(f"round {index} of {rounds}, {said}: {error}") from error
        part: Any = part_of(small, submodule)
        notes, plan = report(part), part.meta["fxprune"]["plan"]
        so_far = plan if so_far is None else composed(so_far, plan)
        errors += [] if notes.error is None else [notes.error]
        left *= _left(notes, what)
    assert so_far is not None  # there is one round at least
    if not what:
        return Outcome(small, so_far, max(errors, default=None))
    budget = Budget(what, goal, left)
    if left > goal + ROUNDING:
        said = f"{budget}: what could still go is tied to what stays in the original"
        warnings.warn(said, FxpruneWarning, stacklevel=3)
    return Outcome(small, replace(so_far, budget=budget, alpha=None), max(errors, default=None))


def _left(notes: Report, what: str) -> float:
    """The share of what a budget is of that one round left."""
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
                f"the second plan is for {second.widths[site]} channels of {site}, of which the first keeps "
                f"{len(first.keep.get(site, ()))}: make it for the model that the first leads to"
            )
    keep = {
        site: tuple(kept[index] for index in second.keep.get(site, range(len(kept))))
        for site, kept in first.keep.items()
    }
    return replace(first, keep=keep)


def _fit(graph: ModelGraph, so_far: Plan | None) -> Fit:
    """Brings channels back to a later round's plan that are tied to others only in the original, `graph`.

    (What is left may be less coupled: where attention has one head, its places are free to go.)
    """
    if so_far is None:
        return lambda plan: plan
    coupling, before = coupling_of(graph, so_far), so_far

    def fit(plan: Plan) -> Plan:
        stays = _stays(coupling, composed(before, plan))
        keep = dict(plan.keep)
        for site in coupling.sites:
            if site.name in keep:
                units = site.units[list(before.keep[site.name])]
                keep[site.name] = tuple(np.flatnonzero(np.append(stays, True)[units]).tolist())
        return replace(plan, keep=keep)

    return fit


def _stays(coupling: Coupling, plan: Plan) -> Flags:
    """The units of which the plan keeps a channel at least."""
    stays = np.zeros(coupling.units, dtype=bool)
    for site in coupling.sites:
        units = site.units[list(plan.keep.get(site.name, range(site.width)))]
        stays[units[units >= 0]] = True
    return stays
