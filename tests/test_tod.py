"""The ToD curve against the plain definition with sets."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxprune.planning.tod import ranks, tod_curve

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


@given(rankings())
def test_curve_is_the_share_of_the_intersection(scores: tuple[Scores, Scores]) -> None:
    curve = tod_curve(*scores)
    expected = [float(tod(*scores, k)) for k in range(1, len(scores[0]) + 1)]
    assert curve.tolist() == pytest.approx(expected, abs=1e-15)


def test_ranks_are_a_permutation_and_stable() -> None:
    assert ranks(np.array([2.0, 1.0, 2.0, 1.0])).tolist() == [2, 0, 3, 1]
