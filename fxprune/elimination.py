"""Greedy elimination: in which order units go where, each time, the one goes whose loss costs its readers least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Index = NDArray[np.int64]
RIDGE = 1e-3  # of the mean variance, on the diagonal of every covariance
STEPS = 256  # units of a larger group go several at a time


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One edge: the unit of each of its channels (-1: none), their covariance, and the weights (rows, channels) on it.

    Where the edge is too wide, the covariance is a vector of variances.
    """

    units: Index
    covariance: Matrix
    weights: Matrix

    def within(self, own: range) -> Reading:
        """The edge, seen by one group: its units are numbered from 0, and all others are -1."""
        inside = (self.units >= own.start) & (self.units < own.stop)
        return Reading(np.where(inside, self.units - own.start, -1), self.covariance, self.weights)


def eliminated(readings: Sequence[Reading], count: int) -> Matrix:
    """The cost at which each of `count` units goes, added up: the later it goes, the more.

    The cost of a unit is the share of every reader's output variance that is left unexplained without it, given that
    the weights on what stays are refitted.

    >>> weights, covariance = np.ones((1, 3)), np.array([[1.0, 0.99, 0], [0.99, 1, 0], [0, 0, 2]])
    >>> eliminated([Reading(np.arange(3), covariance, weights)], 3).round(1)
    array([0. , 1. , 0.3])
    """
    states = [_state(reading) for reading in readings if (reading.units >= 0).any()]
    alive = np.ones(count, dtype=bool)
    spent, result = 0.0, np.zeros(count)
    while alive.any():
        costs = sum((state.costs(count) for state in states), np.zeros(count))
        left = np.flatnonzero(alive)
        gone = left[np.argsort(costs[left], kind="stable")[: max(1, len(left) // STEPS)]]
        result[gone] = spent + np.cumsum(np.maximum(costs[gone], 0))
        spent = float(result[gone[-1]])
        alive[gone] = False
        for state in states:
            state.remove(gone)
    return result


class _Independent:
    """An edge of which only the variances are known: nothing stands in for anything."""

    def __init__(self, reading: Reading) -> None:
        self.units = reading.units
        self.shares = reading.covariance * np.square(reading.weights).sum(0)
        self.shares = self.shares / max(float(self.shares.sum()), np.finfo(float).tiny)

    def costs(self, count: int) -> Matrix:
        """The cost of each unit."""
        inside = self.units >= 0
        return np.bincount(self.units[inside], self.shares[inside], minlength=count).astype(np.float64)

    def remove(self, gone: Index) -> None:
        """Nothing: what is left costs what it did."""


class _Refitted:
    """An edge whose weights are refitted as its channels go: its inverse covariance, and its weights' products."""

    def __init__(self, reading: Reading) -> None:
        self.units = reading.units.copy()
        weights, unit = reading.weights, np.eye(len(reading.units))
        mean = float(np.trace(reading.covariance)) / len(unit)
        regular = reading.covariance / mean + RIDGE * unit if mean > 0 else unit  # nothing varies: only weights count
        self.inverse = np.linalg.inv(regular)
        self.products = weights.T @ weights
        self.scale = max(float((self.products * regular).sum()), np.finfo(float).tiny)
        self.single = len(np.unique(self.units[self.units >= 0])) == (self.units >= 0).sum()

    def costs(self, count: int) -> Matrix:
        """The cost of each unit."""
        costs = np.zeros(count)
        if self.single:
            inside = np.flatnonzero(self.units >= 0)
            costs[self.units[inside]] = np.diagonal(self.products)[inside] / np.diagonal(self.inverse)[inside]
        else:
            for unit in np.unique(self.units[self.units >= 0]):
                places = np.flatnonzero(self.units == unit)
                block = np.ix_(places, places)
                costs[unit] = np.trace(np.linalg.solve(self.inverse[block], self.products[block]))
        return costs / self.scale

    def remove(self, gone: Index) -> None:
        """Take units out: their weights go over to the others."""
        places = np.flatnonzero(np.isin(self.units, gone))
        if not len(places):
            return
        shares = np.linalg.solve(self.inverse[np.ix_(places, places)], self.inverse[places])
        moved = self.products[:, places] @ shares
        self.products -= moved + moved.T - shares.T @ self.products[np.ix_(places, places)] @ shares
        self.inverse -= self.inverse[:, places] @ shares
        stay = np.setdiff1d(np.arange(len(self.units)), places)
        self.products, self.inverse = (m[np.ix_(stay, stay)] for m in (self.products, self.inverse))
        self.units = self.units[stay]


def _state(reading: Reading) -> _Independent | _Refitted:
    return _Independent(reading) if reading.covariance.ndim == 1 else _Refitted(reading)
