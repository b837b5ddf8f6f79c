"""Allocation: from scores to the level at which each unit is removed, and from a level to the kept units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxprune.caller.arguments import CHECKS, check_value, chosen, is_whole, shown
from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.coupling.kinds import BRANCHES, HIDDEN, KINDS
from fxprune.errors import PlanError, close_names, error_text
from fxprune.planning.tod import LARGEST_SHARE, balanced, ranks, tod_curve

RoundTo = int | Mapping[str, int]  # one multiple for all groups, or one for each kind of units
Groups = Sequence[tuple[str, int, int]]
Allocate = Callable[[Scalars, Scalars, Groups], Scalars]
EVEN = 1e-9  # levels that differ by less are equal for alpha; a budget tells them apart


def tod(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The tolerance of difference, with protected units chosen over the whole network.

    Like `tod_by_group`, but protection is ranked over the network: at depth k of a group of n, a unit is protected if
    it is among the k / n of all units that are highest by `protect`. So a group that the network needs more keeps more
    of its units.

    >>> tod(np.array([0.1, 0.2, 0.1, 0.2]), np.array([1.0, 2.0, 3.0, 4.0]), [("a", 0, 2), ("b", 2, 4)]).round(3)
    array([ 0., inf,  1., inf])
    """
    level = np.full(len(propose), np.inf)
    share = ranks(protect) / max(len(protect), 1)  # of the network's units that rank lower
    for _, start, end in groups:
        most = int(LARGEST_SHARE * (end - start))
        order = np.argsort(propose[start:end], kind="stable")[:most]
        needed = np.maximum.accumulate(share[start:end][order])  # at equal levels, less protected units go first
        curve = curve_within(propose[start:end], share[start:end])[:most]
        level[start + order] = _lowest_from(curve) + EVEN / 2 * needed
    return level


def curve_within(propose: Scalars, share: Scalars) -> Scalars:
    """ToD(k) for k = 1 .. n of a group; `share` is, for each unit, the share of all units that rank below it.

    A unit is protected at depth k where its share is at least 1 - k / n. With shares of the group, this is `tod_curve`.

    >>> curve_within(np.array([0.1, 0.2, 0.3]), np.array([0.0, 0.5, 0.9]))
    array([0. , 0.5, 1. ])
    """
    n = len(propose)
    protected_from = np.clip(np.ceil(n * (1 - share) - EVEN).astype(np.int64), 1, n)  # the depth
    both = np.cumsum(np.bincount(np.maximum(ranks(propose) + 1, protected_from), minlength=n + 1)[1:])
    curve: Scalars = both / np.arange(1, n + 1)
    return curve


def tod_by_group(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The tolerance of difference of each group (arXiv 2508.02291): the k-th unit is removed at min ToD(j), j >= k.

    Only j <= 0.99 n count; later units are never removed.

    >>> tod_by_group(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 2.0, 4.0, 3.0]), [("conv", 0, 4)])
    array([0.        , 0.        , 0.66666667,        inf])
    """
    level = np.full(len(propose), np.inf)
    for _, start, end in groups:
        most = int(LARGEST_SHARE * (end - start))
        curve = tod_curve(propose[start:end], protect[start:end])[:most]
        order = np.argsort(propose[start:end], kind="stable")[:most]
        level[start + order] = _lowest_from(curve)
    return level


def _lowest_from(curve: Scalars) -> Scalars:
    """The lowest value of a curve from each place on."""
    return np.minimum.accumulate(curve[::-1])[::-1]


def uniform(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """The same share of every group: the k-th of n units is removed at k / n.

    >>> uniform(np.array([0.1, 0.4, 0.3, 0.2]), np.zeros(4), [("conv", 0, 4)])
    array([0.25, 1.  , 0.75, 0.5 ])
    """
    level = np.full(len(propose), np.inf)
    for _, start, end in groups:
        level[start:end] = (ranks(propose[start:end]) + 1) / (end - start)
    return level


def network_wide(propose: Scalars, protect: Scalars, groups: Groups) -> Scalars:
    """One ranking of all units, by the score over its group's mean size: the k-th of n is removed at k / n.

    >>> network_wide(np.array([1.0, 3.0, 10.0, 20.0]), np.zeros(4), [("a", 0, 2), ("b", 2, 4)])
    array([0.25, 1.  , 0.5 , 0.75])
    """
    scaled = np.zeros(len(propose))
    for _, start, end in groups:
        mean = float(np.abs(propose[start:end]).mean())
        scaled[start:end] = propose[start:end] / mean if mean > 0 else 1.0
    return (ranks(scaled) + 1) / max(len(scaled), 1)


ALLOCATIONS: dict[str, Allocate] = {
    "tod": tod,
    "tod-by-group": tod_by_group,
    "uniform": uniform,
    "global": network_wide,
}
MEASURED = "measured"  # by curves: it is no function of two rankings
_FUNCTION = "a function (propose, protect, groups) -> levels"
CHECKS["allocate"] = chosen((*ALLOCATIONS, MEASURED), PlanError, _FUNCTION)


def _check_round_to(name: str, value: Any) -> None:
    """Raise where a value is neither a multiple nor a dict of kinds of units and multiples."""
    for kind, multiple in value.items() if isinstance(value, Mapping) else [("", value)]:
        if kind and kind not in KINDS:
            raise PlanError(f"{name}: there is no kind of units {kind!r}{close_names(kind, KINDS)}: {', '.join(KINDS)}")
        if not is_whole(multiple, below=1 << 31):
            where = f"{name}: {kind!r} has" if kind else f"{name} is"
            raise PlanError(f"{where} {shown(multiple)}; it is a whole number, at least 1 and below 2**31")


CHECKS["round_to"] = _check_round_to
BESIDE, ONLY = "beside", "only"  # how residual branches are removed: beside units of layers, or alone


def _check_blocks(name: str, value: Any) -> None:
    """Raise where a value is neither True, False nor "only"."""
    if not isinstance(value, (bool, np.bool_)) and value != ONLY:
        raise PlanError(f'{name} is {shown(value)}; it is True, False, or "only" to keep all widths')


def blocks_of(value: bool | str) -> str:  # noqa: FBT001 - the argument itself
    """How branches are removed by the argument `blocks`; empty where they are not."""
    return ONLY if value == ONLY else BESIDE if value else ""


CHECKS["blocks"] = _check_blocks


def jointly(level: Scalars, propose: Scalars, groups: Groups, repeats: Sequence[Sequence[int]]) -> Scalars:
    """The levels, made equal across repeated groups of one size: the k-th units of all are removed at once.

    Their common level is the median of the groups' levels (the higher middle one of an even number). `repeats` are sets
    of group numbers.

    >>> jointly(np.array([0.1, 0.5, 0.9, 0.3]), np.zeros(4), [("a", 0, 2), ("b", 2, 4)], [(0, 1)])
    array([0.3, 0.9, 0.9, 0.3])
    """
    level = level.copy()
    for numbers in repeats:
        bounds = [groups[number][1:] for number in numbers]
        orders = np.stack([start + np.lexsort((propose[start:end], level[start:end])) for start, end in bounds])
        level[orders] = np.sort(level[orders], axis=0)[len(orders) // 2]
    return level


def levels(
    allocate: str | Allocate, propose: Scalars, protect: Scalars, groups: Groups, worth: Scalars | None = None
) -> Scalars:
    """The lowest level at which each unit is removed, by a named allocation or a function of the caller's.

    `worth` is what the model costs less without each unit; protection is then taken per cost.

    Raises PlanError where there is no allocation of that name, or it does not give one number for each unit.
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
            f"for {len(propose)} units: give one level for each unit, inf where it is never removed"
        )
    return level


def weighed(protect: Scalars, worth: Scalars | None) -> Scalars:
    """Protection per cost that the removal of a unit saves; a unit that saves nothing is kept."""
    return protect if worth is None else protect / np.maximum(worth, 1e-9)


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """The level of every unit, and the constraints that hold at any level.

    A group keeps at least `min_keep` units, and a multiple of `round_to`, which may be given by the `kinds` of the
    groups' units; branches may all be removed. `counts` are the numbers that a group can keep, where these are not all.
    `pieces` are sets of units of which at least one is kept; `equal`,
    `larger` and `floors` are those of `balanced`. Units of a group are removed by rising level, and at equal levels by
    rising `propose`. `groups` follow each other and hold all units.
    """

    level: Scalars
    propose: Scalars
    groups: Groups
    pieces: tuple[Index, ...] = ()
    equal: tuple[tuple[Index, ...], ...] = ()
    larger: tuple[tuple[Index, ...], ...] = ()
    floors: tuple[tuple[Index, int], ...] = ()
    min_keep: int = 1
    round_to: RoundTo = 1
    kinds: tuple[str, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()
    multiples: Index = field(init=False)
    least: Index = field(init=False)
    sizes: Index = field(init=False)
    order: Index = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.array([end - start for _, start, end in self.groups], dtype=np.int64)
        number = np.repeat(np.arange(len(sizes)), sizes)
        by_kind = self.round_to if isinstance(self.round_to, Mapping) else dict.fromkeys(KINDS, self.round_to)
        kinds = self.kinds or (HIDDEN,) * len(sizes)
        multiples, least = (
            [by_kind.get(kind, 1) for kind in kinds],
            [self.min_keep * (kind != BRANCHES) for kind in kinds],
        )
        object.__setattr__(self, "multiples", np.array(multiples, dtype=np.int64))
        object.__setattr__(self, "least", np.array(least, dtype=np.int64))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "order", np.lexsort((self.propose, self.level, number)))

    def keep(self, alpha: float) -> Flags:
        """The units kept at a level: one bool per unit."""
        return self.settled(self.level > alpha)

    def settled(self, keep: Flags) -> Flags:
        """The kept units once enough are restored, those removed last first, for all constraints to hold."""
        keep = self._rounded(keep)
        for units in self.pieces:
            if not keep[units].any():
                keep[units[np.argmax(self.propose[units])]] = True
        return balanced(
            keep, self.propose, self.equal, self.larger, self.floors, round_to=self.multiples.max(initial=1)
        )

    def fewest(self, units: Index) -> int:
        """How many of some units `floors` keep at least."""
        return sum(least for floor, least in self.floors if np.isin(floor, units).all())

    def at_once(self, units: Index) -> int:
        """How many units of a bundle are removed at once: one of each group, where these are of one size."""
        sizes = [end - start for _, start, end in self.groups if np.isin(start, units)]
        return len(sizes) if len(set(sizes)) == 1 else 1

    def late(self) -> Scalars:
        """The place of each unit in its group's order of removal, as a share of the group; the last one's is 1."""
        late = np.empty(len(self.order))
        starts = np.cumsum(self.sizes) - self.sizes
        place = np.arange(len(self.order)) - np.repeat(starts, self.sizes) + 1
        late[self.order] = place / np.repeat(self.sizes, self.sizes)
        return late

    def _rounded(self, keep: Flags) -> Flags:
        """The kept units once each group keeps enough of them: a multiple of its number in `multiples`, a count."""
        removed = ~keep[self.order]
        ends = np.cumsum(np.append(0, removed))[np.append(0, np.cumsum(self.sizes))]
        kept = self.sizes - np.diff(ends)
        wanted = -(-np.maximum(kept, self.least) // self.multiples) * self.multiples
        for number, counts in enumerate(self.counts):
            if counts:
                fitting = (n for n in counts if n >= wanted[number] and n % self.multiples[number] == 0)
                wanted[number] = next(fitting, self.sizes[number])
        restored = np.minimum(wanted, self.sizes) - kept
        from_last = np.repeat(ends[1:], self.sizes) - np.cumsum(removed) + 1  # 1 at the unit of a group removed last
        rounded = np.empty_like(keep)
        rounded[self.order] = ~removed | (from_last <= np.repeat(restored, self.sizes))
        return rounded
