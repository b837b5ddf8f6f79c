"""From the scores of blocks to scores and a plan of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.caller.arrays import Index, Scalars
from fxprune.coupling.groups import Site
from fxprune.errors import PlanError
from fxprune.planning.curves import Curves, bundles
from fxprune.scoring.scores import Scores


@dataclass(frozen=True, slots=True, eq=False)
class _Curve:
    """The curve of some units of one block, numbered as in the whole model: depths, divergences, order of removal."""

    depths: Index
    values: Scalars
    order: Index


def joint_scores(whole: Scores, parts: Sequence[tuple[str, Scores]]) -> Scores:
    """The scores of a whole model from those of its blocks, which are given with their paths.

    Groups that keep equal numbers in all blocks get one curve: the sum of those of the blocks, each of which loses the
    same share of its units.
    """
    propose, protect = np.zeros(len(whole.propose)), np.zeros(len(whole.propose))
    curves = list[_Curve]()
    for path, part in parts:
        units = units_in(whole.sites, path, part.sites, len(part.propose))
        propose[units], protect[units] = part.propose, part.protect
        if part.curves is not None:
            curves += _curves_of(part, units)
    scores = replace(whole, propose=propose, protect=protect)
    if not curves:
        return scores
    found = [_joined([own for own in curves if np.isin(own.order, units).all()]) for units in _bundles(scores)]
    ends = np.cumsum([0, *(len(own.depths) for own in found)])
    columns = ([getattr(own, name) for own in found] for name in ("depths", "values", "order"))
    return replace(scores, curves=Curves(ends, *map(np.concatenate, columns)))


def units_in(whole: Iterable[Site], path: str, part: Iterable[Site], count: int) -> Index:
    """The unit of the whole model for each unit of the block at a path, by the sites of both.

    Raises PlanError where the block has other units than its part of the whole model.
    """
    sites, units = {site.name: site.units for site in whole}, np.full(count, -1, dtype=np.int64)
    for site in part:
        own, there = site.units, sites.get(f"{path}.{site.name}")  # none of nodes, which have other names there
        if there is not None:
            if not np.array_equal(own < 0, there < 0):
                raise PlanError(f"{path}.{site.name} has other units in the whole model than in its block alone")
            units[own[own >= 0]] = there[own >= 0]
    if (units < 0).any() or len(np.unique(units)) < len(units):
        raise PlanError(f"units of {path} are coupled in the whole model in another way than in the block alone")
    return units


def _bundles(scores: Scores) -> list[Index]:
    return bundles(scores.allocation("uniform"))


def _curves_of(part: Scores, units: Index) -> list[_Curve]:
    assert part.curves is not None
    found, start = list[_Curve](), 0
    for number, own in enumerate(_bundles(part)):
        order = part.curves.order[start : start + len(own)]
        start += len(own)
        found.append(_Curve(*part.curves.of(number), units[order]))
    return found


def _joined(curves: Sequence[_Curve]) -> _Curve:
    """The sum of several curves, at equal shares of their units, without the depth 0 at which they begin."""
    shares = curves[0].depths[1:] / len(curves[0].order)
    depths = sum((np.rint(shares * len(own.order)).astype(np.int64) for own in curves), np.zeros(len(shares), np.int64))
    values = sum((np.interp(shares * len(own.order), own.depths, own.values) for own in curves), np.zeros(len(shares)))
    order = np.concatenate([own.order for own in curves])
    late = np.concatenate([np.arange(1, len(own.order) + 1) / len(own.order) for own in curves])
    return _Curve(depths, values, order[np.argsort(late, kind="stable")])
