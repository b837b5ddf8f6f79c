"""Tolerance of Difference: how far two rankings of a group disagree (arXiv 2508.02291), and even widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fxprune.caller.arrays import Flags

LARGEST_SHARE = 0.99  # of a group's units may go at the most


def ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The 0-based rank of each score by rising value; equals keep their order.

    >>> ranks(np.array([3.0, 1.0, 2.0]))
    array([2, 0, 1])
    """
    order = np.argsort(scores, kind="stable")
    result = np.empty(len(scores), dtype=np.int64)
    result[order] = np.arange(len(scores))
    return result


def tod_curve(propose: NDArray[np.float64], protect: NDArray[np.float64]) -> NDArray[np.float64]:
    """ToD(k) = |{k lowest by propose} and {k highest by protect}| / k for k = 1 .. n, in O(n log n).

    A unit is in both sets exactly from k = max(u + 1, n - r) on, with its ranks u and r.

    >>> tod_curve(np.array([0.1, 0.2, 0.3, 0.4]), np.array([4.0, 3.0, 2.0, 1.0]))
    array([1., 1., 1., 1.])
    """
    n = len(propose)
    first = np.maximum(ranks(propose) + 1, n - ranks(protect))
    both = np.cumsum(np.bincount(first, minlength=n + 1)[1:])
    return both / np.arange(1, n + 1)


def balanced(
    keep: Flags,
    propose: NDArray[np.float64],
    equal: Sequence[Sequence[NDArray[np.int64]]],
    larger: Sequence[Sequence[NDArray[np.int64]]] = (),
    *,
    round_to: int = 1,
) -> Flags:
    """The units that stay once every site of a set keeps as many channels as the one that keeps most.

    A site is given by the unit of each of its channels (-1: always stays). In each pair of `larger`, the first keeps
    more channels than the second, to the next multiple of `round_to`. Units high by `propose` come back first.

    >>> sites = np.array([0, 1, 2]), np.array([3, 4, 5])
    >>> balanced(np.array([True, True, False, True, False, False]), np.arange(6.0), [sites])
    array([ True,  True, False,  True, False,  True])
    """
    padded, before = np.append(keep, True), -1
    while before != padded.sum():
        before = padded.sum()
        for sites in equal:
            most = max(int(padded[units].sum()) for units in sites)
            for units in sites:
                _bring_back(padded, propose, units, most)
        for units, other in larger:
            if padded[units].sum() <= padded[other].sum():
                _bring_back(padded, propose, units, (int(padded[other].sum()) // round_to + 1) * round_to)
    return padded[:-1]


def _bring_back(padded: Flags, propose: NDArray[np.float64], units: NDArray[np.int64], count: int) -> None:
    """Bring units back, in place, until a site keeps at least `count` channels."""
    gone, channels = np.unique(units[~padded[units]], return_counts=True)
    order = np.argsort(-propose[gone], kind="stable")
    kept = padded[units].sum() + np.cumsum(channels[order]) - channels[order]
    padded[gone[order[kept < count]]] = True
