"""Budgets: the level at which a plan costs a given share of the original, and not more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log10

import numpy as np

from fxprune.caller.arguments import check_value
from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.coupling.collector import EXCLUDED, STATISTIC
from fxprune.errors import PlanError, UnreachableError
from fxprune.planning.allocation import EVEN, Allocation
from fxprune.planning.plan import BUDGETS

Cost = Callable[[Flags], float]
TOLERANCE = 0.01  # share of the budget that may be left unspent
DEFAULT_ALPHA = 0.05  # where neither a level nor a budget is given
NOTHING = -1.0  # the level at which every unit is kept
Frozen = Iterable[tuple[Sequence[str], str]]  # layers that are kept whole, and why
ROUNDS = "run compress with rounds=2 or more"
INEXACT = "score with inexact=True"
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

    If more than 1 % of the budget is left unspent, units of the last level are restored as long as they fit. Those
    removed last, relative to their group, come first.

    Raises UnreachableError where no level is within the budget. Its message suggests the `remedies`, or names the
    `frozen` layers if nothing can be removed at all.
    """
    steps = allocation.level[allocation.level <= 1 + EVEN]
    levels = np.unique(np.append(steps, NOTHING))
    whole = cost(np.ones(len(allocation.level), dtype=bool))
    limit = share * whole
    least = _least(allocation, cost) / max(whole, 1e-300)
    if least * whole > limit:
        asked, least_possible = percentages(share, least)
        asked = f"{what}={share:g} asks for {asked} of the {BUDGETS[what]}, but "
        remedies = list(remedies)
        if not len(allocation.level) or (least >= 1 and not remedies):
            raise PlanError(asked + nothing_prunable("the model", frozen))
        enough = [f"raise {what}={share:g} to at least {_rounded_up(least)}"] * (least < 1)
        raise UnreachableError(f"{asked}{least_possible} is the least that can be reached", [*remedies, *enough])
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

    Where layers keep equal numbers, units of lower levels may be restored, too: several layers lose units at once
    there, so the level before may be far away.
    """
    late, level = allocation.late(), allocation.level
    keep = _restored(allocation, cost, limit, keep, np.flatnonzero(before & ~keep), -late)
    if allocation.equal:
        keep = _restored(allocation, cost, limit, keep, np.flatnonzero(~keep & (level > NOTHING)), -level)
    return keep


def _restored(allocation: Allocation, cost: Cost, limit: float, keep: Flags, waiting: Index, order: Scalars) -> Flags:
    """The units `keep`, and as many of those `waiting` as the limit allows, until less than 1 % of it is left.

    They are restored in their order, as long as each fits; one that does not is passed over.
    """
    waiting = waiting[np.argsort(order[waiting], kind="stable")]

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


def remedies(allocation: Allocation, cost: Cost, share: float, even: Scalars, frozen: Frozen = ()) -> Iterator[str]:
    """Suggestions for a `share` that cannot be reached: what limits most first, and only what would help.

    `even` are the levels of the allocation "uniform", by which a group can lose all units that it need not keep.
    """
    least = _least(allocation, cost)
    freed = {"round_to": replace(allocation, round_to=1), "min_keep": replace(allocation, min_keep=1)}
    helping = [name for name, other in freed.items() if _least(other, cost) < least]
    if not helping and _least(replace(allocation, round_to=1, min_keep=1), cost) < least:
        helping = list(freed)  # only together
    if helping:
        yield "lower " + " and ".join(f"{name}={getattr(allocation, name)}" for name in helping)
    if _least(replace(allocation, level=even), cost) <= share * cost(np.ones(len(even), dtype=bool)):
        yield from (ROUNDS, 'pass allocate="uniform"')
    if any(why.endswith(STATISTIC) for _, why in frozen):
        yield INEXACT
    if any(EXCLUDED in why for _, why in frozen):
        yield "exclude less"


def _least(allocation: Allocation, cost: Cost) -> float:
    """The cost at the last level."""
    steps = allocation.level[allocation.level <= 1 + EVEN]
    return cost(allocation.keep(float(steps.max(initial=NOTHING))))


def _rounded_up(share: float) -> str:
    """A share between 0 and 1 with three digits, not below itself.

    >>> _rounded_up(0.018341), _rounded_up(0.5)
    ('0.0184', '0.5')
    """
    digits = 3 - ceil(log10(share))
    return f"{ceil(round(share * 10**digits, 6)) / 10**digits:g}"


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
