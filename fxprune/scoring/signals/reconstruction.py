"""Greedy elimination: in which order units go where, each time, the one goes whose loss costs its readers least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxprune.caller.arrays import Index

Matrix = NDArray[np.float64]
RIDGE = 1e-3  # of the mean variance, on the diagonal of every covariance
STEPS = 64  # units of a larger group go several at a time
CANDIDATES = 4  # for every unit that goes in a step, as many are looked at one by one
ROWS = 128  # of a matrix that are changed at once: their copy stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One edge: the unit of each of its P channels (-1: none), their covariance, and the products of their weights.

    Both are (P, P); where the edge is too wide for that, (P,): the variances, and the squares of the weights.
    """

    units: Index
    covariance: Matrix
    products: Matrix

    @classmethod
    def of(cls, units: Index, covariance: Matrix, weights: Matrix) -> Reading:
        """An edge whose channels stand under the columns of a weight (rows, P)."""
        return cls(units, covariance, np.square(weights).sum(0) if covariance.ndim == 1 else weights.T @ weights)

    def within(self, own: range) -> Reading:
        """The edge, seen by one group: its units are numbered from 0, and all others are -1."""
        inside = (self.units >= own.start) & (self.units < own.stop)
        return Reading(np.where(inside, self.units - own.start, -1), self.covariance, self.products)


def eliminated(readings: Sequence[Reading], count: int) -> Matrix:
    """The cost at which each of `count` units goes, added up: the later it goes, the more.

    The cost of a unit is the share of every reader's output variance that is left unexplained without it, given that
    the weights on what stays are refitted.

    >>> weights, covariance = np.ones((1, 3)), np.array([[1.0, 0.99, 0], [0.99, 1, 0], [0, 0, 2]])
    >>> eliminated([Reading.of(np.arange(3), covariance, weights)], 3).round(1)
    array([0. , 1. , 0.3])
    """
    states = [_state(reading) for reading in readings if (reading.units >= 0).any()]
    if all(isinstance(state, _Independent) for state in states):
        return _added_up(_costs(states, count))
    left = np.arange(count)
    spent, result = 0.0, np.zeros(count)
    while len(left):
        few = max(1, len(left) // STEPS)
        costs = _costs(states, count)
        near = left[np.argsort(costs[left], kind="stable")[: CANDIDATES * few]]
        gone, paid = (near[:1], costs[near[:1]]) if few == 1 else _one_by_one(states, near, few, count)
        result[gone] = spent + np.cumsum(np.maximum(paid, 0))
        spent = float(result[gone[-1]])
        left = np.delete(left, np.searchsorted(left, gone))
        for state in states:
            state.remove(gone)
    return result


def _added_up(costs: Matrix) -> Matrix:
    """Costs that do not change as units go, each with all lower ones."""
    order = np.argsort(costs, kind="stable")
    result = np.zeros(len(costs))
    result[order] = np.cumsum(costs[order])
    return result


def _one_by_one(states: Sequence[State], near: Index, few: int, count: int) -> tuple[Index, Matrix]:
    """The units that go first of those `near`, so many of them, each at its cost once those before it went."""
    own, left = [state.among(near) for state in states], near
    gone, paid = np.zeros(few, dtype=np.int64), np.zeros(few)
    for step in range(few):
        costs = _costs(own, count)[left]
        gone[step], paid[step] = left[costs.argmin()], costs.min()
        left = np.delete(left, costs.argmin())
        for state in own:
            state.remove(gone[step : step + 1])
    return gone, paid


def _costs(states: Sequence[State], count: int) -> Matrix:
    """The cost of each unit on all edges."""
    return sum((state.costs(count) for state in states), np.zeros(count))


class _Independent:
    """An edge of which only the variances are known: nothing stands in for anything."""

    def __init__(self, units: Index, shares: Matrix) -> None:
        self.units, self.shares = units, shares

    @classmethod
    def of(cls, reading: Reading) -> _Independent:
        """The edge, with the share of its readers' output that each channel makes up."""
        shares = reading.covariance * reading.products
        return cls(reading.units, shares / max(float(shares.sum()), np.finfo(float).tiny))

    def among(self, near: Index) -> _Independent:
        """The edge, seen by some units alone."""
        own = _places(self.units, near)
        return _Independent(self.units[own], self.shares[own])

    def costs(self, count: int) -> Matrix:
        """The cost of each unit."""
        inside = self.units >= 0
        return np.bincount(self.units[inside], self.shares[inside], minlength=count).astype(np.float64)

    def remove(self, gone: Index) -> None:
        """Nothing: what is left costs what it did."""


class _Refitted:
    """An edge whose weights are refitted as its channels go: its inverse covariance, and its weights' products.

    Channels that went keep their places, which no longer matter, until half of all are such: moving the others
    together takes longer than an elimination does.
    """

    def __init__(self, units: Index, inverse: Matrix, products: Matrix, scale: float) -> None:
        self.units, self.inverse, self.products, self.scale = units, inverse, products, scale
        self.single = len(np.unique(units[units >= 0])) == (units >= 0).sum()
        self.there = np.ones(len(units), dtype=np.bool_)

    @classmethod
    def of(cls, reading: Reading) -> _Refitted:
        """The edge before anything goes; costs are shares of its readers' output variance."""
        unit = np.eye(len(reading.units))
        mean = float(np.trace(reading.covariance)) / len(unit)
        covariance = (reading.covariance + reading.covariance.T) / 2  # rounding leaves it not quite symmetric
        regular = covariance / mean + RIDGE * unit if mean > 0 else unit  # nothing varies: only weights count
        scale = max(float(np.vdot(reading.products, regular)), np.finfo(float).tiny)
        return cls(
            reading.units.copy(), np.asarray(np.linalg.inv(regular), dtype=np.float64), reading.products.copy(), scale
        )

    def among(self, near: Index) -> _Refitted:
        """The edge, seen by some units alone; what they cost, and how that changes as they go, stays the same."""
        places = _places(self.units, near)
        block = np.ix_(places, places)
        return _Refitted(self.units[places], self.inverse[block], self.products[block], self.scale)

    def costs(self, count: int) -> Matrix:
        """The cost of each unit."""
        costs = np.zeros(count)
        if self.single:
            inside = np.flatnonzero(self.units >= 0)
            costs[self.units[inside]] = self.products.diagonal()[inside] / self.inverse.diagonal()[inside]
        else:
            for unit in np.unique(self.units[self.units >= 0]):
                places = np.flatnonzero(self.units == unit)
                block = np.ix_(places, places)
                costs[unit] = np.trace(np.linalg.solve(self.inverse[block], self.products[block]))
        return costs / self.scale

    def remove(self, gone: Index) -> None:
        """Take units out: their weights go over to the others."""
        places = _places(self.units, gone)
        if not len(places):
            return
        rows = self.inverse[places]
        shares = np.asarray(np.linalg.solve(rows[:, places], rows), dtype=np.float64)
        moved = self.products[:, places] - shares.T @ self.products[np.ix_(places, places)] / 2
        _subtract(self.products, moved, shares)
        _subtract(self.products, shares.T, moved.T)
        _subtract(self.inverse, rows.T, shares)
        self.units[places], self.there[places] = -1, False
        if 2 * self.there.sum() < len(self.there):
            self._move_together()

    def _move_together(self) -> None:
        block = np.ix_(self.there, self.there)
        self.inverse, self.products = self.inverse[block], self.products[block]
        self.units, self.there = self.units[self.there], self.there[self.there]


def _places(units: Index, chosen: Index) -> Index:
    """Where one of the chosen units stands; np.isin, only faster."""
    marks = np.zeros(max(units.max(initial=0), chosen.max(initial=0)) + 2, dtype=np.bool_)
    marks[chosen] = True
    return np.flatnonzero(marks[units])  # -1 looks up the last one, which is nobody's


def _subtract(matrix: Matrix, left: Matrix, right: Matrix) -> None:
    """Take a product of two matrices, (P, n) and (n, P), from another in place."""
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, start + ROWS)
        matrix[rows] -= left[rows] @ right


State = _Independent | _Refitted


def _state(reading: Reading) -> State:
    return _Independent.of(reading) if reading.covariance.ndim == 1 else _Refitted.of(reading)
