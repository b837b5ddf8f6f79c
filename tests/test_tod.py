"""The ToD curve and the allocation against the plain definition with sets."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxprune.tod import ranks, removed, tod_curve

Scores = NDArray[np.float64]


@st.composite
def rankings(draw: st.DrawFn, ties: bool = True) -> tuple[Scores, Scores]:
    """Two score vectors of one length; with few distinct values where ``ties``."""
    n = draw(st.integers(1, 40))
    values = st.integers(0, 5 if ties else 10**9)
    unique = not ties
    both = [draw(st.lists(values, min_size=n, max_size=n, unique=unique)) for _ in range(2)]
    return np.array(both[0], dtype=np.float64), np.array(both[1], dtype=np.float64)


def lowest(scores: Scores, k: int) -> set[int]:
    """The k lowest, the earlier of equals first."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:k])


def highest(scores: Scores, k: int) -> set[int]:
    """The k highest: all but the n - k lowest."""
    return set(range(len(scores))) - lowest(scores, len(scores) - k)


def tod(propose: Scores, protect: Scores, k: int) -> Fraction:
    return Fraction(len(lowest(propose, k) & highest(protect, k)), k)


def largest_k(propose: Scores, protect: Scores, alpha: Fraction, most: int) -> int:
    return max((k for k in range(1, most + 1) if tod(propose, protect, k) <= alpha), default=0)


@given(rankings())
def test_curve_is_the_share_of_the_intersection(scores: tuple[Scores, Scores]) -> None:
    curve = tod_curve(*scores)
    expected = [float(tod(*scores, k)) for k in range(1, len(scores[0]) + 1)]
    assert curve.tolist() == pytest.approx(expected, abs=1e-15)


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


def test_agreeing_rankings_remove_the_lower_half_at_zero() -> None:
    scores = np.arange(10, dtype=np.float64)
    assert removed(scores, scores, 0.0).tolist() == [0, 1, 2, 3, 4]


def test_opposite_rankings_remove_nothing_below_one() -> None:
    scores = np.arange(10, dtype=np.float64)
    assert removed(scores, -scores, 0.999).tolist() == []


def test_ranks_are_a_permutation_and_stable() -> None:
    assert ranks(np.array([2.0, 1.0, 2.0, 1.0])).tolist() == [2, 0, 3, 1]
