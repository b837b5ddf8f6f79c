"""Allocation: from scores to the level at which each unit goes, and from a level to the units that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.caller.arguments import CHECKS, check_value, chosen
from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.errors import PlanError, error_text
from fxprune.planning.tod import LARGEST_SHARE, balanced, ranks, tod_curve

Groups = Sequence[tuple[str, int, int]]
Allocate = Callable[[Scalars, Scalars, Groups], Scalars]
EVEN = 1e-9  # levels that differ by less are one for alpha; a budget tells them apart


def tod(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The tolerance of difference, with what is protected chosen over the whole network.

    As `tod_by_group`, but a unit is protected at depth k of its group of n where it is among the k / n of all units of
    the network that are highest by `protect`: a group that the network needs keeps more of its units than others do.

    >>> tod(np.array([0.1, 0.2, 0.1, 0.2]), np.array([1.0, 2.0, 3.0, 4.0]), [("a", 0, 2), ("b", 2, 4)]).round(3)
    array([ 0., inf,  1., inf])
    """
    level = np.full(len(propose), np.inf)
    share = ranks(protect) / max(len(protect), 1)  # of the network's units that are lower
    for _, start, end in groups:
        n = end - start
        most = int(LARGEST_SHARE * n)
        order = np.argsort(propose[start:end], kind="stable")
        curve = curve_within(propose[start:end], share[start:end])[:most]
        within = np.maximum.accumulate(share[start:end][order])[:most]  # of one level, what the network needs goes last
        level[start + order[:most]] = np.minimum.accumulate(curve[::-1])[::-1] + EVEN / 2 * within
    return level


def curve_within(propose: Scalars, share: Scalars) -> Scalars:
    """ToD(k) for k = 1 .. n of a group, by the share of some larger whole that each of its units has below it.

    A unit is protected at depth k where that share is at least 1 - k / n. Of shares within the group, this is
    `tod_curve`.

    >>> curve_within(np.array([0.1, 0.2, 0.3]), np.array([0.0, 0.5, 0.9]))
    array([0. , 0.5, 1. ])
    """
    n = len(propose)
    from_depth = np.ceil(n * (1 - share) - EVEN).astype(np.int64)  # at which it is protected
    first = np.maximum(ranks(propose) + 1, np.minimum(np.maximum(from_depth, 1), n))
    both = np.cumsum(np.bincount(first, minlength=n + 1)[1 : n + 1])
    curve: Scalars = both / np.arange(1, n + 1)
    return curve


def tod_by_group(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The tolerance of difference, group by group (arXiv 2508.02291): the k-th unit goes at min ToD(j) over j >= k.

    Only j <= 0.99 n count, and the units behind them never go.

    >>> tod_by_group(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 2.0, 4.0, 3.0]), [("conv", 0, 4)])
    array([0.        , 0.        , 0.66666667,        inf])
    """
    level = np.full(len(propose), np.inf)
    for _, start, end in groups:
        most = int(LARGEST_SHARE * (end - start))
        curve = tod_curve(propose[start:end], protect[start:end])[:most]
        order = np.argsort(propose[start:end], kind="stable")[:most]
        level[start + order] = np.minimum.accumulate(curve[::-1])[::-1]
    return level


def uniform(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The same share of every group: the k-th of n units goes at k / n.

    >>> uniform(np.array([0.1, 0.4, 0.3, 0.2]), np.zeros(4), [("conv", 0, 4)])
    array([0.25, 1.  , 0.75, 0.5 ])
    """
    level = np.full(len(propose), np.inf)
    for _, start, end in groups:
        level[start:end] = (ranks(propose[start:end]) + 1) / (end - start)
    return level


def over_all(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """One ranking of the whole network, of the scores divided by their group's mean size: the k-th of n goes at k / n.

    >>> over_all(np.array([1.0, 3.0, 10.0, 20.0]), np.zeros(4), [("a", 0, 2), ("b", 2, 4)])
    array([0.25, 1.  , 0.5 , 0.75])
    """
    scaled = np.zeros(len(propose))
    for _, start, end in groups:
        mean = float(np.abs(propose[start:end]).mean())
        scaled[start:end] = propose[start:end] / mean if mean > 0 else 1.0
    return (ranks(scaled) + 1) / max(len(scaled), 1)


ALLOCATIONS: dict[str, Allocate] = {"tod": tod, "tod-by-group": tod_by_group, "uniform": uniform, "global": over_all}
_FUNCTION = "a function (propose, protect, groups) -> levels"
CHECKS["allocate"] = chosen(ALLOCATIONS, PlanError, _FUNCTION)


def levels(
    allocate: str | Allocate, propose: Scalars, protect: Scalars, groups: Groups, worth: Scalars | None = None
) -> Scalars:
    """The lowest level at which each unit goes, by a named allocation or one of the caller's.

    `worth` is what the model costs less without each unit; what is protected is then protected for its share of that.

    Raises PlanError where there is none of that name, or what it gives is not one number a unit.
    """
    check_value("allocate", allocate)
    function = ALLOCATIONS[allocate] if isinstance(allocate, str) else allocate
    try:
        level = np.asarray(function(propose, weighed(protect, worth), groups), dtype=np.float64)
    except Exception as error:
        raise PlanError(f"allocate= fails ({error_text(error)}): {_FUNCTION}") from error
    if level.shape != propose.shape or np.isnan(level).any():
        raise PlanError(
            f"the allocation gives levels of shape {level.shape}, {int(np.isnan(level).sum())} of them nan, "
            f"for {len(propose)} units: give one level a unit, inf where it never goes"
        )
    return level


def weighed(protect: Scalars, worth: Scalars | None) -> Scalars:
    """What units are protected by, over what the model costs less without each; one that saves nothing stays."""
    return protect if worth is None else protect / np.maximum(worth, 1e-9)


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """The level of every unit, and what has to hold whatever the level.

    A group keeps at least `min_keep` units, and a multiple of `round_to`. `pieces` are sets of units of which one at
    least stays; `equal` and `larger` are what `balanced` takes. In a group those of lower level leave first, of equal
    level those of lower `propose`. `groups` follow each other and hold all units.
    """

    level: Scalars
    propose: Scalars
    groups: Groups
    pieces: tuple[Index, ...] = ()
    equal: tuple[tuple[Index, ...], ...] = ()
    larger: tuple[tuple[Index, ...], ...] = ()
    min_keep: int = 1
    round_to: int = 1
    sizes: Index = field(init=False)
    order: Index = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.array([end - start for _, start, end in self.groups], dtype=np.int64)
        number = np.repeat(np.arange(len(sizes)), sizes)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "order", np.lexsort((self.propose, self.level, number)))

    def keep(self, alpha: float) -> Flags:
        """The units that stay at a level: one bool a unit."""
        return self.settled(self.level > alpha)

    def settled(self, keep: Flags) -> Flags:
        """The units that stay once enough are brought back, those that left last first, that all holds."""
        keep = self._rounded(keep)
        for units in self.pieces:
            if not keep[units].any():
                keep[units[np.argmax(self.propose[units])]] = True
        return balanced(keep, self.propose, self.equal, self.larger, round_to=self.round_to)

    def late(self) -> Scalars:
        """How late in its group each unit leaves, as a share of the group: 1 the last."""
        late = np.empty(len(self.order))
        late[self.order] = (np.arange(len(self.order)) - self._before() + 1) / np.repeat(self.sizes, self.sizes)
        return late

    def _before(self) -> Index:
        """The number of units in the groups before that of each unit."""
        return np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)

    def _rounded(self, keep: Flags) -> Flags:
        """The units that stay once each group keeps enough of them."""
        gone = ~keep[self.order]
        ends = np.cumsum(np.append(0, gone))[np.append(0, np.cumsum(self.sizes))]
        stay = self.sizes - np.diff(ends)
        wanted = -(-np.maximum(stay, self.min_keep) // self.round_to) * self.round_to
        back = np.minimum(wanted, self.sizes) - stay
        from_last = np.repeat(ends[1:], self.sizes) - np.cumsum(gone) + 1  # 1 at the unit of a group that left last
        rounded = np.empty_like(keep)
        rounded[self.order] = ~gone | (from_last <= np.repeat(back, self.sizes))
        return rounded
