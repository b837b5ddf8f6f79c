"""Allocations: the level of every unit, and the units that stay at a level."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_tod import lowest, rankings, tod
from zoo import ZOO

import fxprune
from fxprune.errors import PlanError
from fxprune.planning.allocation import ALLOCATIONS, EVEN, Allocation, levels
from fxprune.planning.tod import tod_curve

Scores = NDArray[np.float64]
NAMES = tuple(ALLOCATIONS)


def removed(
    propose: Scores, protect: Scores, alpha: float, allocate: str = "tod-by-group", **limits: int
) -> NDArray[np.int64]:
    """The units that the only group loses."""
    groups = [("only", 0, len(propose))]
    allocation = Allocation(levels(allocate, propose, protect, groups), propose, groups, **limits)
    return np.flatnonzero(~allocation.keep(alpha))


def largest_k(propose: Scores, protect: Scores, alpha: Fraction, most: int) -> int:
    return max((k for k in range(1, most + 1) if tod(propose, protect, k) <= alpha), default=0)


@given(rankings(), st.integers(0, 20))
def test_removed_are_the_k_lowest_for_the_largest_k(scores: tuple[Scores, Scores], twentieths: int) -> None:
    alpha, n = Fraction(twentieths, 20), len(scores[0])
    k = largest_k(*scores, alpha, most=min(99 * n // 100, n - 1))
    assert set(removed(*scores, float(alpha)).tolist()) == lowest(scores[0], k)


@given(rankings(), st.floats(0, 1), st.integers(1, 12), st.integers(1, 8))
def test_floor_and_multiple_hold(scores: tuple[Scores, Scores], alpha: float, floor: int, multiple: int) -> None:
    n = len(scores[0])
    gone = removed(*scores, alpha, min_keep=floor, round_to=multiple)
    kept = n - len(gone)
    assert kept >= min(n, floor)
    assert kept % multiple == 0 or kept == n
    free = len(removed(*scores, alpha, min_keep=floor))
    assert free - multiple < len(gone) <= free
    assert set(gone.tolist()) == lowest(scores[0], len(gone))


@given(rankings(), st.floats(0, 1), st.sets(st.integers(1, 12), min_size=1))
def test_a_group_keeps_one_of_its_counts(scores: tuple[Scores, Scores], alpha: float, counts: set[int]) -> None:
    n, free = len(scores[0]), len(scores[0]) - len(removed(*scores, alpha))
    gone = removed(*scores, alpha, counts=(tuple(sorted(counts)),))
    assert n - len(gone) == min((count for count in counts if free <= count <= n), default=n)
    assert set(gone.tolist()) == lowest(scores[0], len(gone))


@given(rankings(), st.floats(0, 1), st.floats(0, 1))
def test_more_tolerance_removes_no_less(scores: tuple[Scores, Scores], one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert set(removed(*scores, low).tolist()) <= set(removed(*scores, high).tolist())


@given(rankings(), st.floats(0, 0.99))
def test_never_more_than_the_bound(scores: tuple[Scores, Scores], alpha: float) -> None:
    """|A and B| >= 2k - n, so k <= n / (2 - alpha)."""
    n = len(scores[0])
    assert len(removed(*scores, alpha)) <= n / (2 - alpha) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 700, 1000, 12300])
def test_ninety_nine_percent_at_most(n: int) -> None:
    scores = np.arange(n, dtype=np.float64)
    assert len(removed(scores, scores, 1.0)) == min(99 * n // 100, n - 1)


# -- the levels of all allocations -------------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> tuple[Scores, Scores, list[tuple[str, int, int]]]:
    """The scores of a few groups."""
    parts = draw(st.lists(rankings(), min_size=1, max_size=4))
    ends = np.cumsum([len(propose) for propose, _ in parts]).tolist()
    groups = [(f"g{i}", start, end) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return np.concatenate([p for p, _ in parts]), np.concatenate([r for _, r in parts]), groups


@given(networks(), st.floats(0, 1))
def test_tod_by_group_treats_every_group_as_if_it_were_alone(
    network: tuple[Scores, Scores, list[tuple[str, int, int]]], alpha: float
) -> None:
    propose, protect, groups = network
    keep = Allocation(levels("tod-by-group", propose, protect, groups), propose, groups).keep(alpha)
    for _, start, end in groups:
        curve = tod_curve(propose[start:end], protect[start:end])[: int(0.99 * (end - start))]
        k = max((i + 1 for i, share in enumerate(curve.tolist()) if share <= alpha + 1e-12), default=0)
        assert set(np.flatnonzero(~keep[start:end]).tolist()) == lowest(propose[start:end], k)


@pytest.mark.parametrize("name", NAMES)
@given(network=networks())
def test_units_leave_each_group_by_rising_score(
    name: str, network: tuple[Scores, Scores, list[tuple[str, int, int]]]
) -> None:
    propose, protect, groups = network
    level = levels(name, propose, protect, groups)
    for _, start, end in groups:
        order = np.argsort(propose[start:end], kind="stable")
        ordered = level[start:end][order]
        assert ((ordered[1:] >= ordered[:-1]) | np.isinf(ordered[1:])).all()
    assert (level >= 0).all()
    assert (level[np.isfinite(level)] <= 1 + EVEN).all()


@given(networks(), st.integers(0, 10))
def test_uniform_takes_the_same_share_of_every_group(
    network: tuple[Scores, Scores, list[tuple[str, int, int]]], tenths: int
) -> None:
    propose, protect, groups = network
    keep = Allocation(levels("uniform", propose, protect, groups), propose, groups).keep(tenths / 10)
    for _, start, end in groups:
        n = end - start
        assert keep[start:end].sum() == max(n - tenths * n // 10, 1)


def test_global_compares_scores_relative_to_their_groups() -> None:
    propose = np.array([1.0, 2.0, 9.0, 300.0, 10.0, 2990.0])
    groups = [("a", 0, 3), ("b", 3, 6)]
    assert levels("global", propose, propose, groups).tolist() == [2 / 6, 4 / 6, 5 / 6, 3 / 6, 1 / 6, 1.0]


def test_global_does_without_a_mean() -> None:
    assert levels("global", np.zeros(3), np.zeros(3), [("a", 0, 3)]).tolist() == [1 / 3, 2 / 3, 1.0]


# -- protection over the whole network ---------------------------------------------------------------------------------


def protected(protect: Scores, groups: list[tuple[str, int, int]], k: int, n: int) -> set[int]:
    """The units that are among the k / n of all units that are highest by `protect`."""
    total = len(protect)
    order = sorted(range(total), key=lambda i: (protect[i], i), reverse=True)
    return set(order[: k * total // n])


@given(networks(), st.integers(0, 20))
def test_tod_protects_over_the_whole_network(
    network: tuple[Scores, Scores, list[tuple[str, int, int]]], twentieths: int
) -> None:
    """The definition, with sets: in every group the largest k of which a share of at most alpha is protected."""
    propose, protect, groups = network
    alpha = Fraction(twentieths, 20)
    keep = Allocation(levels("tod", propose, protect, groups), propose, groups).keep(float(alpha) + EVEN)
    for _, start, end in groups:
        n, k = end - start, 0
        for depth in range(1, 99 * n // 100 + 1):
            first = {start + unit for unit in lowest(propose[start:end], depth)}
            if Fraction(len(first & protected(protect, groups, depth, n)), depth) <= alpha:
                k = depth
        assert set(np.flatnonzero(~keep[start:end]).tolist()) == lowest(propose[start:end], min(k, n - 1))


@given(rankings())
def test_tod_of_a_single_group_is_tod_by_group(scores: tuple[Scores, Scores]) -> None:
    one, two = (levels(name, *scores, [("only", 0, len(scores[0]))]) for name in ("tod", "tod-by-group"))
    assert (np.isinf(one) == np.isinf(two)).all()
    finite = np.isfinite(one)
    assert np.abs(one[finite] - two[finite]).max(initial=0) <= EVEN / 2


@given(networks(), st.floats(0, 1), st.floats(0, 1))
def test_tod_is_monotone(network: tuple[Scores, Scores, list[tuple[str, int, int]]], one: float, two: float) -> None:
    propose, protect, groups = network
    allocation = Allocation(levels("tod", propose, protect, groups), propose, groups)
    low, high = sorted((one, two))
    assert (allocation.keep(high) <= allocation.keep(low)).all()


def test_of_one_level_what_the_network_needs_goes_last() -> None:
    propose, protect = np.tile(np.arange(4.0), 2), np.array([0.0, 2, 8, 9, 1, 3, 7, 6])
    level = levels("tod", propose, protect, [("a", 0, 4), ("b", 4, 8)])
    first = [0, 1, 4, 5]
    assert (level[first] < EVEN).all()
    assert [first[i] for i in np.argsort(level[first])] == [0, 4, 1, 5]


def test_protection_is_weighed_by_worth() -> None:
    """A unit that saves twice as much has to be needed twice as much."""
    propose, protect, groups = np.arange(8.0), np.random.default_rng(0).random(8) + 1, [("a", 0, 4), ("b", 4, 8)]
    worth = np.array([4.0, 1, 2, 1, 1, 8, 1, 2])
    weighed = levels("tod", propose, protect * worth, groups, worth)
    assert np.array_equal(weighed, levels("tod", propose, protect, groups))
    worth[2] = 0
    saves_nothing = levels("tod", propose, protect, groups, worth)
    most = protect / np.maximum(worth, 1)
    most[2] = 1e9
    assert np.array_equal(saves_nothing, levels("tod", propose, most, groups))


@pytest.mark.parametrize("per", ["macs", "params"])
def test_worth_is_the_cost_of_a_unit_by_its_channels(per: str) -> None:
    scores = scores_of("residual")
    assert scores.costs is not None
    assert scores.channels is not None
    sites = {site.name: site.units for site in scores.sites}
    assert (scores.channels[sites["a.conv1"]] == 1).all()
    assert (scores.channels[sites["stem"]] == 2).all()  # of the layer that is added to it as well
    costs = {"macs": scores.costs.unit_macs, "params": scores.costs.unit_params}[per](len(scores.propose))
    expected = levels("tod", scores.propose, scores.protect / (costs / scores.channels), scores.groups)
    assert np.array_equal(scores.allocation("tod", per=per).level, expected)
    whole = dataclasses.replace(scores, channels=None).allocation("tod", per=per).level
    assert np.array_equal(whole, levels("tod", scores.propose, scores.protect, scores.groups))
    published = scores.allocation("tod-by-group", per=per).level
    assert np.array_equal(published, levels("tod-by-group", scores.propose, scores.protect, scores.groups))


# -- through Scores.plan -----------------------------------------------------------------------------------------------


def scores_of(name: str) -> fxprune.Scores:
    case = ZOO[name]
    return fxprune.Scores.random(case.build(), case.example(2), seed=0)


def test_a_function_allocates() -> None:
    """The second half of every group by number, whatever the scores."""

    def back(propose: Scores, protect: Scores, groups: list[tuple[str, int, int]]) -> Scores:
        level = np.full(len(propose), np.inf)
        for _, start, end in groups:
            level[(start + end) // 2 : end] = 0.5
        return level

    scores = scores_of("residual")
    before = scores.plan(0.4, allocate=back)
    assert {site: len(kept) for site, kept in before.keep.items()} == before.widths
    plan = scores.plan(0.5, allocate=back)
    assert plan.keep["stem"] == (0, 1, 2, 3)
    assert plan.keep["b.conv1"] == tuple(range(6))


@pytest.mark.parametrize("name", NAMES)
def test_floors_and_multiples_hold(name: str) -> None:
    plan = scores_of("residual").plan(0.8, allocate=name, min_keep=3, round_to=4)
    free = [site for site in plan.keep if site != "head.2"]
    assert all(len(plan.keep[site]) >= 4 and len(plan.keep[site]) % 4 == 0 for site in free)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", ["residual", "grouped_chain", "lstm_projected_deep_both_ways", "channel_slices"])
def test_every_allocation_makes_plans_that_apply(name: str, net: str) -> None:
    case = ZOO[net]
    model, example = case.build(), case.example(2)
    plan = fxprune.Scores.random(model, example, seed=1).plan(0.6, allocate=name)
    assert fxprune.verify(model, plan, fxprune.apply(model, plan), example) < 1e-4


def test_a_name_that_is_none() -> None:
    with pytest.raises(
        PlanError,
        match="allocate is 'layerwise'; it is one of tod, tod-by-group, uniform, global, measured, or a function",
    ):
        scores_of("mlp").plan(0.1, allocate="layerwise")


def test_levels_of_another_number() -> None:
    with pytest.raises(PlanError, match=r"the allocation gives levels of shape \(3,\), 1 of them nan, for \d+ units"):
        scores_of("mlp").plan(0.1, allocate=lambda *_: np.array([0.0, np.nan, 1.0]))
