"""Greedy elimination against brute force: every unit is tried, and the weights on what stays are fitted anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxprune.scoring.signals.reconstruction import RIDGE, STEPS, EdgeStatistics, elimination_costs

Matrix = NDArray[np.float64]


def error_without(reading: EdgeStatistics, gone: set[int]) -> float:
    """The share of the readers' output variance that is lost once the best weights on what stays are found."""
    covariance = reading.covariance + RIDGE * np.trace(reading.covariance) / len(reading.units) * np.eye(
        len(reading.units)
    )
    out = np.isin(reading.units, list(gone))
    stay, go, products = ~out, out, reading.products
    if not go.any():
        return 0.0
    fitted = np.linalg.lstsq(covariance[np.ix_(stay, stay)], covariance[np.ix_(stay, go)], rcond=None)[0]
    left = covariance[np.ix_(go, go)] - covariance[np.ix_(go, stay)] @ fitted
    lost = float((left * products[np.ix_(go, go)]).sum())
    return lost / float((products * covariance).sum())


def greedy(readings: list[EdgeStatistics], count: int) -> Matrix:
    """What `elimination_costs` says it gives, found by trying every unit at every step."""
    gone: set[int] = set()
    costs = np.zeros(count)
    while len(gone) < count:
        left = [unit for unit in range(count) if unit not in gone]
        totals = [sum(error_without(reading, gone | {unit}) for reading in readings) for unit in left]
        best = left[int(np.argmin(totals))]
        gone.add(best)
        costs[best] = min(totals)
    return costs


def reading(units: list[int], seed: int, rows: int = 3) -> EdgeStatistics:
    random = np.random.default_rng(seed)
    x = random.normal(size=(40, len(units))) @ random.normal(size=(len(units), len(units)))
    return EdgeStatistics.of(
        np.array(units), np.cov(x.T, bias=True).reshape(len(units), -1), random.normal(size=(rows, len(units)))
    )


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_one_place_a_unit(count: int, seed: int) -> None:
    readings = [reading(list(range(count)), seed)]
    assert elimination_costs(readings, count) == pytest.approx(greedy(readings, count), rel=1e-6, abs=1e-9)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.integers(0, 10_000))
def test_several_places_a_unit_and_some_that_stay(units: list[int], seed: int) -> None:
    """Units without any place cost nothing, and go first."""
    readings = [reading(units, seed)]
    assert elimination_costs(readings, 4) == pytest.approx(greedy(readings, 4), rel=1e-6, abs=1e-9)


def test_all_that_is_read_is_lost_once_all_units_are() -> None:
    assert elimination_costs([reading(list(range(6)), 0)], 6).max() == pytest.approx(1)


def test_one_of_two_that_say_the_same_goes_first_and_the_other_is_dear() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5))
    x[:, 3] = 2 * x[:, 1]  # by far the most variance, and not needed twice
    costs = elimination_costs([EdgeStatistics.of(np.arange(5), np.cov(x.T), np.eye(5))], 5)
    order = np.argsort(costs).tolist()
    assert order[0] in (1, 3)
    assert costs[order[0]] < 0.01
    assert order[-1] == 4 - order[0]


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_the_scales_of_activations_and_weights_do_not_matter(values: float, weights: float) -> None:
    one = reading(list(range(5)), 1)
    other = EdgeStatistics(one.units, values * one.covariance, weights**2 * one.products)
    assert elimination_costs([other], 5) == pytest.approx(elimination_costs([one], 5), rel=1e-6)


@pytest.mark.parametrize("units", [[0, 1, 2], [0, 0, 1, 1, 2]])
def test_activations_that_do_not_vary(units: list[int]) -> None:
    """Then any order is as good, but it has to be one."""
    found = elimination_costs(
        [EdgeStatistics.of(np.array(units), np.zeros((len(units), len(units))), np.ones((2, len(units))))], 3
    )
    assert np.isfinite(found).all()
    assert elimination_costs([EdgeStatistics.of(np.arange(3), np.zeros(3), np.ones((2, 3)))], 3).tolist() == [0, 0, 0]


def test_variances_alone_are_shares_of_the_output() -> None:
    units = np.array([2, 0, -1, 1, 1])
    variances, weights = np.array([1.0, 2.0, 5.0, 1.0, 3.0]), np.array([[1.0, 1, 1, 2, 1], [0, 2, 0, 0, 0]])
    shares = np.array([10.0, 4 + 3, 1]) / (1 + 10 + 5 + 4 + 3)
    assert elimination_costs([EdgeStatistics.of(units, variances, weights)], 3) == pytest.approx(
        [shares.sum(), shares[2] + shares[1], shares[2]]
    )


def test_of_many_pairs_that_say_the_same_one_stays_although_several_go_at_a_time() -> None:
    pairs = 2 * STEPS
    values = np.repeat(np.random.default_rng(1).normal(size=(1000, pairs)), 2, axis=1)
    costs = elimination_costs([EdgeStatistics.of(np.arange(2 * pairs), np.cov(values.T), np.eye(2 * pairs))], 2 * pairs)
    first = np.argsort(costs)[:pairs] // 2
    assert len(np.unique(first)) == pairs
    assert np.sort(costs)[pairs - 1] < 0.01


def test_several_at_a_time_go_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * STEPS
    readings = [reading(list(range(count)), 0, rows=9), reading([0, 0, 1, 1, *range(2, count)], 1)]
    found = elimination_costs(readings, count)
    monkeypatch.setattr("fxprune.scoring.signals.reconstruction.STEPS", count)
    wanted = elimination_costs(readings, count)
    assert found.max() == pytest.approx(wanted.max(), rel=1e-6)
    assert np.corrcoef(np.argsort(np.argsort(found)), np.argsort(np.argsort(wanted)))[0, 1] > 0.99


def test_a_group_sees_its_own_units() -> None:
    own = EdgeStatistics.of(np.array([4, 9, -1, 5, 6]), np.eye(5), np.eye(5)).within(range(4, 7))
    assert own.units.tolist() == [0, -1, -1, 1, 2]


def test_rounding_that_makes_a_covariance_asymmetric_does_not_count() -> None:
    """All that there is goes in the end, so the costs add up to it; of nearly dependent channels, too."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 6))
    covariance = np.cov(values.T) + 1e-6 * np.triu(rng.normal(size=(6, 6)), 1)
    weights = rng.normal(size=(3, 6))
    units = np.array([0, 0, 1, 1, 2, 2])
    costs = elimination_costs([EdgeStatistics.of(units, covariance, weights)], 3)
    assert costs.max() == pytest.approx(1, abs=1e-9)
    even = elimination_costs([EdgeStatistics.of(units, (covariance + covariance.T) / 2, weights)], 3)
    assert costs == pytest.approx(even, abs=1e-9)
