"""The groups of a report: widths before and after, the rankings of their units, and the layers left whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.caller.computed_weights import parametrized
from fxprune.coupling.groups import Coupling, Site
from fxprune.planning.allocation import curve_within, weighed
from fxprune.planning.plan import Plan
from fxprune.planning.tod import ranks
from fxprune.reporting.records import SAMPLED, FrozenReport, GroupReport, Ranking, RouterReport
from fxprune.scoring.scores import Scores


def group_reports(coupling: Coupling, keep: Flags, excluded: Iterable[str]) -> tuple[GroupReport, ...]:
    """The widths of every prunable group, before and after; groups of excluded sites are left out."""
    out = set(excluded)
    return tuple(
        GroupReport(
            group.name,
            len(group),
            int(keep[group.units.start : group.units.stop].sum()),
            site_widths(group.sites, keep),
            group.inexact,
        )
        for group in coupling.prunable
        if not out.issuperset(site.name for site in group.sites)
    )


def site_widths(sites: Iterable[Site], keep: Flags) -> dict[str, tuple[int, int]]:
    """The channels of every site, before and after."""
    padded = np.append(keep, True)
    return {site.name: (site.width, int(padded[_within(site.units, len(keep))].sum())) for site in sites}


def frozen_reports(frozen: Mapping[str, tuple[str, ...]], graph: nn.Module, part: str) -> tuple[FrozenReport, ...]:
    """The layers of a graph (of the part at `part`) that are left whole, by reason, with layers of computed weights."""
    return tuple(FrozenReport(sites, why) for why, sites in (dict(frozen) | parametrized(graph, part)).items())


def router_reports(coupling: Coupling, keep: Flags) -> tuple[RouterReport, ...]:
    """The experts of every router, and those that are kept."""
    padded, sites = np.append(keep, True), {site.name: site.units for site in coupling.sites}
    return tuple(
        RouterReport(
            router.site,
            len(sites[router.site]),
            tuple(np.flatnonzero(padded[_within(sites[router.site], len(keep))]).tolist()),
            router.chosen,
        )
        for router in coupling.routers
    )


def with_usage(routers: Iterable[RouterReport], scores: Scores) -> tuple[RouterReport, ...]:
    """The routers with the use of their experts, where the scores know it."""
    usage = scores.about.get("experts", {})
    return tuple(replace(each, usage=tuple(usage[each.router]) if each.router in usage else None) for each in routers)


def with_rankings(groups: Iterable[GroupReport], found: Mapping[str, Ranking]) -> tuple[GroupReport, ...]:
    """The groups, each with the ranking of its name, where that is of as many units."""
    pairs = ((group, found.get(group.name)) for group in groups)
    return tuple(
        replace(group, ranking=ranking if ranking and ranking.proposed[-1] == group.before - 1 else None)
        for group, ranking in pairs
    )


def rankings(scores: Scores, plan: Plan) -> dict[str, Ranking]:
    """The ranking of every group of scores, by its name, and the units that a plan keeps.

    Protection is ranked as the plan's allocation ranked it: for "tod" over the whole network, per cost that a unit
    saves; for all others within the group.
    """
    whole = plan.allocate == "tod"
    protect = weighed(scores.protect, scores.worth(plan.allocate, per=plan.budget.of if plan.budget else "macs"))
    over_network, kept = ranks(protect), _kept(scores, plan)
    found = {}
    for name, start, end in scores.groups:
        protected = over_network[start:end] if whole else ranks(protect[start:end])
        among = len(protect) if whole else end - start
        found[name] = _ranking(scores.propose[start:end], protected, among, kept[start:end], plan.allocate)
    return found


def _ranking(propose: Scalars, protected: Index, among: int, kept: Flags, allocate: str | None) -> Ranking:
    """The ranking of one group, sampled at even distances of the order in which its units are proposed."""
    n = len(propose)
    proposed = np.unique(np.linspace(0, n - 1, min(n, SAMPLED)).round().astype(np.int64))
    units = np.argsort(propose, kind="stable")[proposed]
    curve = curve_within(propose, protected / among)[proposed].round(4)
    ranked, stays = tuple(protected[units].tolist()), tuple(kept[units].tolist())
    return Ranking(tuple(proposed.tolist()), ranked, stays, tuple(curve.tolist()), among, allocate)


def _kept(scores: Scores, plan: Plan) -> Flags:
    """The units of which the plan keeps a channel."""
    kept = np.zeros(len(scores.propose) + 1, dtype=bool)
    for site in scores.sites:
        units = site.units[list(plan.keep.get(site.name, range(site.width)))]
        kept[_within(units, len(scores.propose))] = True
    return kept[:-1]


def _within(units: Index, count: int) -> Index:
    """Unit numbers, with -1 for those of frozen units."""
    return np.where(units < count, units, -1)
