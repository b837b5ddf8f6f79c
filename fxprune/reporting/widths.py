"""The widths of groups before and after, and why the frozen ones kept theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fxprune.caller.computed_weights import parametrized
from fxprune.coupling.groups import Coupling
from fxprune.reporting.records import (
    FrozenReport,
    GroupReport,
    Ranking,
)


def group_reports(coupling: Coupling, keep: NDArray[np.bool_], excluded: Iterable[str]) -> tuple[GroupReport, ...]:
    """The widths of every prunable group, before and after; groups of excluded sites are left out."""
    padded, out = np.append(keep, True), set(excluded)
    return tuple(
        GroupReport(
            group.name,
            len(group),
            int(keep[group.units.start : group.units.stop].sum()),
            {site.name: (site.width, int(padded[_free(site.units, len(keep))].sum())) for site in group.sites},
            group.inexact,
        )
        for group in coupling.prunable
        if not out.issuperset(site.name for site in group.sites)
    )


def with_rankings(groups: Iterable[GroupReport], found: Mapping[str, Ranking]) -> tuple[GroupReport, ...]:
    """The groups, each with the ranking of its name, where that is of as many units."""
    return tuple(
        replace(group, ranking=ranking if ranking and ranking.proposed[-1] == group.before - 1 else None)
        for group, ranking in ((group, found.get(group.name)) for group in groups)
    )


def frozen_reports(frozen: Mapping[str, tuple[str, ...]], graph: nn.Module, part: str) -> tuple[FrozenReport, ...]:
    """The layers of a graph, of the part at `part`, that stay whole, by reason; computed weights are one of these."""
    by_reason = [FrozenReport(sites, reason) for reason, sites in frozen.items()]
    return (*by_reason, *(FrozenReport((layer,), why) for layer, why in parametrized(graph, part)))


def _free(units: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Unit numbers, with -1 for those of frozen units."""
    return np.where(units < count, units, -1)
