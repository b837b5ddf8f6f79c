"""Residual branches as units: the last group of a coupling, of one site with one channel for each unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fxprune.caller.arrays import Index
from fxprune.coupling.collector import EXCLUDED, Collector
from fxprune.coupling.groups import Coupling, Group, Residual, Site
from fxprune.coupling.kinds import BRANCHES
from fxprune.coupling.residuals import ResidualNodes, blocks_of, named
from fxprune.rules.labels import Labels

SITE = "branch:"  # and the name of a branch: the site of its unit, which may lose its one channel
WHOLE = "whole"  # blocks, entries of lists of modules, are the units, not single branches

Unit = tuple[str, Sequence[ResidualNodes]]


def with_branches(coupling: Coupling, collector: Collector, found: Sequence[ResidualNodes], how: str) -> Coupling:
    """A coupling with the residual branches of its graph as units, or its blocks where `how` is `WHOLE`."""
    graph: Any = collector.graph
    blocks = blocks_of(graph, found) if how == WHOLE else {}
    single = {} if how == WHOLE else named(graph, found)
    units: list[Unit] = [*blocks.items(), *((name, (own,)) for name, own in single.items())]
    why = {name: _reason(name, own, coupling, collector) for name, own in units}
    free = [name for name in why if why[name] is None]
    start, block_of = coupling.units, {id(own): path for path, branches in blocks.items() for own in branches}
    number = {name: start + place for place, name in enumerate(free)}
    unit_of = {id(own): number.get(name, -1) for name, branches in units for own in branches}
    sites = {name: Site(f"{SITE}{name}", np.array([number.get(name, -1)], dtype=np.int64)) for name in why}
    groups = [_shifted(group, start, len(free)) for group in coupling.groups]
    prunable = [group for group in groups if group.frozen is None]
    frozen = [group for group in groups if group.frozen is not None]
    if free:
        own = tuple(sites[name] for name in free)
        readers = tuple(branch.total.name for name, branches in units if why[name] is None for branch in branches)
        prunable.append(Group(BRANCHES, range(start, start + len(free)), own, readers, kind=BRANCHES))
    end = start + len(free) + sum(map(len, frozen))
    for place, name in enumerate(name for name in why if why[name] is not None):
        site = replace(sites[name], units=np.array([end + place], dtype=np.int64))
        frozen.append(Group(site.name, range(end + place, end + place + 1), (site,), (), why[name], kind=BRANCHES))
    return replace(
        coupling,
        groups=(*prunable, *frozen),
        sites=(*coupling.sites, *sites.values()),
        pieces=(*coupling.pieces, *([np.array(list(number.values()))] if how == WHOLE and free else ())),
        residuals=tuple(
            Residual(
                unit_of.get(id(own), -1), own.total.name, own.branch.name, own.total.args.index(own.shortcut),
                tuple(node.name for node in own.nodes), block_of.get(id(own), ""),
            )
            for own in found
            if own.blocked is None
        ),
    )  # fmt: skip


def shortcut_places(found: Sequence[ResidualNodes]) -> dict[str, int]:
    """The sums that can do without a branch, and the place of the other term among their arguments."""
    return {own.total.name: own.total.args.index(own.shortcut) for own in found if own.blocked is None}


def shortcuts_of(coupling: Coupling) -> dict[str, int]:
    """`shortcut_places` of a coupled graph."""
    return {own.total: own.place for own in coupling.residuals}


def _reason(name: str, branches: Sequence[ResidualNodes], coupling: Coupling, collector: Collector) -> str | None:
    """Why branches stay; None where they can be removed."""
    site = f"{SITE}{name}"
    if site in collector.limits.held:
        return collector.limits.held[site]
    for own in branches:
        if own.blocked is not None:
            return own.blocked
        if any(collector.is_excluded(path) for path in own.paths()):
            return EXCLUDED
        if not _same_channels(coupling.values[own.total.name], coupling.values[own.shortcut.name]):
            return f"channels of the branch are told apart behind {own.total.name}"
    return None


def _same_channels(total: Labels, shortcut: Labels) -> bool:
    """Whether a sum has the labels of its shortcut."""
    pairs = zip(total.planes, shortcut.planes, strict=False)
    same = all(a.axes == b.axes and a.core.equal(b.core) for a, b in pairs)
    return same and len(total.planes) == len(shortcut.planes)


def _shifted(group: Group, start: int, by: int) -> Group:
    """A group with the numbers of units from `start` on made larger."""

    def shift(units: Index) -> Index:
        return np.where(units >= start, units + by, units)

    first = group.units.start + (by if group.units.start >= start else 0)
    sites = tuple(Site(site.name, shift(site.units)) for site in group.sites)
    return replace(group, units=range(first, first + len(group)), sites=sites)
