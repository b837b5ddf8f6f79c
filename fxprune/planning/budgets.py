"""Budgets: the level at which a plan costs a given share of the original, and not more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.caller.arguments import check_value
from fxprune.caller.arrays import Flags
from fxprune.errors import PlanError
from fxprune.planning.allocation import EVEN, Allocate, Allocation
from fxprune.planning.plan import BUDGETS

Cost = Callable[[Flags], float]
TOLERANCE = 0.01  # share of the budget that may be left unspent
DEFAULT_ALPHA = 0.05  # where neither a level nor a budget is given
NOTHING = -1.0  # the level at which every unit is kept
Frozen = Iterable[tuple[Sequence[str], str]]  # layers that are kept whole, and why
_SHOWN = 3  # layers of one reason in a message


@dataclass(frozen=True, slots=True, eq=False)
class WithinBudget:
    """The units kept within a budget, the share of the original that they cost, and the level."""

    keep: Flags
    achieved: float
    level: float | None


def meet(
    allocation: Allocation, cost: Cost, share: float, what: str, remedies: Iterable[str], frozen: Frozen = ()
) -> WithinBudget:
    """Find, by bisection, the lowest level at which the kept units cost at most `share` of the whole.

    Where more than 1 % of the budget is left, units that the level before keeps are restored: those removed last, as a
    share of their group, first.

    Raises PlanError where no level is within the budget; `remedies` are what its message suggests, and `frozen` the
    layers that it names where there are no units at all.
    """
    steps = allocation.level[allocation.level <= 1 + EVEN]
    levels = np.unique(np.append(steps, NOTHING))
    whole = cost(np.ones(len(allocation.level), dtype=bool))
    limit = share * whole
    least = cost(allocation.keep(float(levels[-1]))) / max(whole, 1e-300)
    if least * whole > limit:
        asked, least_possible = percentages(share, least)
        reached = f"{least_possible} is the least that can be reached in one pass: {' or '.join(remedies)}"
        why = reached if len(allocation.level) else nothing_prunable("the model", frozen)
        raise PlanError(f"{what}={share:g} asks for {asked} of the {BUDGETS[what]}, but {why}")
    low, high = -1, len(levels) - 1  # the place of a level above the budget, and of one within
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(allocation.keep(float(levels[middle]))) <= limit else (middle, high)
    keep = allocation.keep(float(levels[high]))
    if low >= 0:
        keep = _filled(allocation, cost, limit, keep, allocation.keep(float(levels[low])))
    level = None if high == 0 else max(round(float(levels[high]), 9), 0.0)  # as finely as EVEN tells alphas apart
    return WithinBudget(keep, cost(keep) / max(whole, 1e-300), level)


def percentages(first: float, second: float) -> tuple[str, str]:
    """Two positive shares as percentages, with as many decimals as tell them apart, and the first from zero.

    >>> percentages(0.3, 0.42), percentages(0.001, 0.00104), percentages(0.0001, 0.42)
    (('30.0%', '42.0%'), ('0.100%', '0.104%'), ('0.01%', '42.00%'))
    """
    pairs = [(f"{first:.{digits}%}", f"{second:.{digits}%}") for digits in range(1, 16)]
    return next((pair for pair in pairs if pair[0] != pair[1] and float(pair[0][:-1]) > 0), pairs[-1])


def _filled(allocation: Allocation, cost: Cost, limit: float, keep: Flags, before: Flags) -> Flags:
    """The units `keep`, and as many of those in `before` as the limit allows, until less than 1 % of it is left.

    They are restored in their order, as long as each fits; one that does not is passed over.
    """
    waiting = np.flatnonzero(before & ~keep)
    waiting = waiting[np.argsort(-allocation.late()[waiting], kind="stable")]

    def with_first(count: int) -> Flags:
        more = keep.copy()
        more[waiting[:count]] = True
        return allocation.settled(more)

    while len(waiting) and cost(keep) < (1 - TOLERANCE) * limit:
        fits, fails = 0, len(waiting) + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if cost(with_first(middle)) <= limit else (fits, middle)
        keep, waiting = with_first(fits), waiting[fits + 1 :]
        waiting = waiting[~keep[waiting]]
    return keep


def remedies(allocate: str | Allocate | None, allocation: Allocation, settings: Mapping[str, Any]) -> list[str]:
    """Suggestions for a budget that cannot be reached."""
    found = ["prune in several rounds=, as compress does"]
    found += [] if allocate == "uniform" else ['pass allocate="uniform"']
    found += [] if allocation.min_keep == 1 else [f"lower min_keep={allocation.min_keep}"]
    found += [] if allocation.round_to == 1 else [f"lower round_to={allocation.round_to}"]
    found += [] if settings.get("inexact") else ["score with inexact=True"]
    return [*found, "exclude less"]


def nothing_prunable(model: str, frozen: Frozen) -> str:
    """The message for a model of which nothing can be pruned: its layers, by the reason why they are kept whole.

    >>> nothing_prunable("Net", [(("0", "fc"), "excluded by the caller")])
    "nothing in Net can be pruned: '0', 'fc': excluded by the caller"
    """
    reasons = (
        f"{', '.join(map(repr, sites[:_SHOWN]))}{f' and {len(sites) - _SHOWN} more' * (len(sites) > _SHOWN)}: {reason}"
        for sites, reason in frozen
    )
    return f"nothing in {model} can be pruned: {'; '.join(reasons) or 'it has no layers with channels'}"


def given(**asked: float | None) -> tuple[str, float] | None:
    """The name and value of the one option among alpha and the budgets that is not None; None if all are.

    Raises PlanError where several are given, or one is no share.
    """
    present = {name: value for name, value in asked.items() if value is not None}
    for name, value in present.items():
        check_value(name, value)
    if len(present) > 1:
        values = " and ".join(f"{name}={value:g}" for name, value in present.items())
        raise PlanError(f"{values} are given: one of {', '.join(asked)} decides how much is removed")
    return next(((name, float(value)) for name, value in present.items()), None)
