"""From scores and a plan to the two orders of every group and its ToD curve, small enough to keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fxprune.caller.arrays import Scalars
from fxprune.planning.allocation import curve_within, weighed
from fxprune.planning.plan import Plan
from fxprune.planning.tod import ranks
from fxprune.reporting.records import SAMPLED, Ranking
from fxprune.scoring.scores import Scores


def rankings(scores: Scores, plan: Plan) -> dict[str, Ranking]:
    """The ranking of every group of scores, by its name, and which of its units stay under a plan.

    Protection is taken as the plan's allocation took it: over the whole network, weighed by what a unit saves, for
    "tod", and within the group for all others.
    """
    per = plan.budget.of if plan.budget else "macs"
    protect = weighed(scores.protect, scores.worth(plan.allocate, per=per))
    over_all, stays = ranks(protect), _staying(scores, plan)
    found = {}
    for name, start, end in scores.groups:
        whole = plan.allocate == "tod"
        protected = over_all[start:end] if whole else ranks(protect[start:end])
        among = len(protect) if whole else end - start
        found[name] = _ranking(scores.propose[start:end], protected, among, stays[start:end], plan.allocate)
    return found


def _ranking(
    propose: Scalars, protected: NDArray[np.int64], among: int, stays: NDArray[np.bool_], allocate: str | None
) -> Ranking:
    """The ranking of one group, sampled at even distances of the order in which its units are proposed."""
    n = len(propose)
    proposed = np.unique(np.linspace(0, n - 1, min(n, SAMPLED)).round().astype(np.int64))
    units = np.argsort(propose, kind="stable")[proposed]
    curve = curve_within(propose, protected / among)[proposed].round(4)
    return Ranking(
        tuple(proposed.tolist()), tuple(protected[units].tolist()), tuple(stays[units].tolist()), tuple(curve.tolist()),
        among, allocate,
    )  # fmt: skip


def _staying(scores: Scores, plan: Plan) -> NDArray[np.bool_]:
    """The units of which the plan keeps a channel."""
    stays = np.zeros(len(scores.propose) + 1, dtype=bool)
    keep: Mapping[str, tuple[int, ...]] = plan.keep
    for site in scores.sites:
        units = site.units[list(keep.get(site.name, range(site.width)))]
        stays[np.where(units < len(scores.propose), units, -1)] = True
    return stays[:-1]
