"""From a method's one number between 0 and 1 to a budget: the least pruning whose MACs are at most the budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from oneshot_models import Workload
from torch import nn

AtBudget = Callable[[float], tuple[nn.Module, float | None]]  # budget, a share of the MACs -> model, level
STEPS = 11  # halvings of the interval of levels


class MissedError(Exception):
    """A method that does not come down to a budget."""


def at_budgets(shrunk: Callable[[float], nn.Module], work: Workload) -> AtBudget:
    """`shrunk` maps a level to a pruned copy, the higher the smaller; levels are tried once for all budgets."""
    full = work.size(work.model)

    @cache
    def share(level: float) -> float:
        return work.size(shrunk(level)) / full

    def at(budget: float) -> tuple[nn.Module, float]:
        level = lowest(share, budget)
        return shrunk(level), level

    return at


def lowest(share: Callable[[float], float], budget: float) -> float:
    """The lowest level whose share is at most the budget, up to 2 ** -STEPS; MissedError where there is none.

    >>> lowest(lambda level: 1 - level, 0.75)
    0.25
    """
    low, high = 0.0, 1.0
    if share(low) <= budget:
        return low
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) <= budget else (middle, high)
    if high == 1.0 and share(high) > budget:
        raise MissedError(f"keeps {share(high):.0%} of the MACs at its highest level")
    return high
