"""Greedy elimination: units are removed one by one, each time the one whose removal costs its readers least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.caller.arrays import Index, Reals, Scalars

RIDGE = 1e-3  # of the mean variance, on the diagonal of every covariance
STEPS = 64  # units of a larger group are removed several at a time
CANDIDATES = 4  # examined one by one for every unit that is removed in a step
ROWS = 128  # of a matrix that are changed at once: their copy stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class EdgeStatistics:
    """The unit of each of P channels of an edge (-1: none), the covariance of the channels, and of their weights.

    `covariance` and `products`, the inner products of the readers' weights on each channel, are (P, P). Of edges too
    wide for that they are (P,): the variances, and the squared norms of the weights.
    """

    units: Index
    covariance: Reals
    products: Reals

    @classmethod
    def of(cls, units: Index, covariance: Reals, weights: Reals) -> EdgeStatistics:
        """Those of an edge whose channels meet the columns of a weight (rows, P)."""
        return cls(units, covariance, np.square(weights).sum(0) if covariance.ndim == 1 else weights.T @ weights)

    def within(self, own: range) -> EdgeStatistics:
        """The same for one group alone: its units are numbered from 0, and all others are -1."""
        inside = (self.units >= own.start) & (self.units < own.stop)
        return EdgeStatistics(np.where(inside, self.units - own.start, -1), self.covariance, self.products)


def elimination_costs(edges: Sequence[EdgeStatistics], count: int) -> Scalars:
    """The total cost of removals up to each of `count` units, in the order of elimination: later ones cost more.

    The cost of a unit is the share of every reader's output variance that is left unexplained without it, once the
    weights on the kept units are refitted.

    >>> weights, covariance = np.ones((1, 3)), np.array([[1.0, 0.99, 0], [0.99, 1, 0], [0, 0, 2]])
    >>> elimination_costs([EdgeStatistics.of(np.arange(3), covariance, weights)], 3).round(1)
    array([0. , 1. , 0.3])
    """
    states = [
        _Independent.of(edge) if edge.covariance.ndim == 1 else _Refitted.of(edge)
        for edge in edges
        if (edge.units >= 0).any()
    ]
    left, spent, result = np.arange(count), 0.0, np.zeros(count)
    if all(isinstance(state, _Independent) for state in states):  # costs do not change as units are removed
        costs = _costs(states, count)
        order = np.argsort(costs, kind="stable")
        result[order] = np.cumsum(costs[order])
        return result
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


def _one_by_one(states: Sequence[State], near: Index, few: int, count: int) -> tuple[Index, Scalars]:
    """The first `few` of the units `near` to be removed, and the cost of each after those before it."""
    own, left = [state.among(near) for state in states], near
    gone, paid = np.zeros(few, dtype=np.int64), np.zeros(few)
    for step in range(few):
        costs = _costs(own, count)[left]
        gone[step], paid[step] = left[costs.argmin()], costs.min()
        left = np.delete(left, costs.argmin())
        for state in own:
            state.remove(gone[step : step + 1])
    return gone, paid


def _costs(states: Sequence[State], count: int) -> Scalars:
    """The cost of each unit on all edges."""
    return sum((state.costs(count) for state in states), np.zeros(count))


@dataclass(frozen=True, slots=True, eq=False)
class _Independent:
    """An edge of which only variances are known: no channel replaces another.

    `parts` are the shares of the readers' output variance that the channels make up.
    """

    units: Index
    parts: Scalars

    @classmethod
    def of(cls, edge: EdgeStatistics) -> _Independent:
        """The edge before any removal."""
        parts = edge.covariance * edge.products
        return cls(edge.units, parts / max(float(parts.sum()), np.finfo(float).tiny))

    def among(self, near: Index) -> _Independent:
        """The edge with some units alone."""
        own = _places(self.units, near)
        return _Independent(self.units[own], self.parts[own])

    def costs(self, count: int) -> Scalars:
        """The cost of each unit."""
        inside = self.units >= 0
        return np.bincount(self.units[inside], self.parts[inside], minlength=count).astype(np.float64)

    def remove(self, gone: Index) -> None:
        """Nothing changes: the costs of kept units stay as they are."""


class _Refitted:
    """An edge whose weights are refitted as its channels are removed: its inverse covariance, and products of weights.

    Removed channels keep their places until they are half of all: moving the others together takes longer than an
    elimination does.
    """

    def __init__(self, units: Index, inverse: Reals, products: Reals, scale: float) -> None:
        self.units, self.inverse, self.products, self.scale = units, inverse, products, scale
        self.single = len(np.unique(units[units >= 0])) == (units >= 0).sum()
        self.kept = np.ones(len(units), dtype=np.bool_)

    @classmethod
    def of(cls, edge: EdgeStatistics) -> _Refitted:
        """The edge before any removal; costs are shares of its readers' output variance."""
        unit = np.eye(len(edge.units), dtype=edge.covariance.dtype)
        mean = float(np.trace(edge.covariance)) / len(unit)
        covariance = (edge.covariance + edge.covariance.T) / 2  # rounding leaves it not quite symmetric
        regular = covariance / mean + RIDGE * unit if mean > 0 else unit  # nothing varies: only weights count
        scale = max(float(np.vdot(edge.products, regular)), np.finfo(float).tiny)
        return cls(edge.units.copy(), np.linalg.inv(regular), edge.products.copy(), scale)

    def among(self, near: Index) -> _Refitted:
        """The edge with some units alone; their costs, and how these change with removals, are the same."""
        places = _places(self.units, near)
        block = np.ix_(places, places)
        return _Refitted(self.units[places], self.inverse[block], self.products[block], self.scale)

    def costs(self, count: int) -> Scalars:
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
        """Remove units, and refit the weights of the others."""
        places = _places(self.units, gone)
        if not len(places):
            return
        rows = self.inverse[places]
        step = np.linalg.solve(rows[:, places], rows)
        moved = self.products[:, places] - step.T @ self.products[np.ix_(places, places)] / 2
        _subtract(self.products, moved, step)
        _subtract(self.products, step.T, moved.T)
        _subtract(self.inverse, rows.T, step)
        self.units[places], self.kept[places] = -1, False
        if 2 * self.kept.sum() < len(self.kept):
            block = np.ix_(self.kept, self.kept)
            self.inverse, self.products = self.inverse[block], self.products[block]
            self.units, self.kept = self.units[self.kept], self.kept[self.kept]


def _places(units: Index, chosen: Index) -> Index:
    """The indices of chosen units, like np.isin, but faster."""
    marks = np.zeros(max(units.max(initial=0), chosen.max(initial=0)) + 2, dtype=np.bool_)
    marks[chosen] = True
    return np.flatnonzero(marks[units])  # -1 looks up the last mark, which is of no unit


def _subtract(matrix: Reals, left: Reals, right: Reals) -> None:
    """Subtract a product of two matrices, (P, n) and (n, P), in place."""
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, start + ROWS)
        matrix[rows] -= left[rows] @ right


State = _Independent | _Refitted
