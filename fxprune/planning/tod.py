"""Tolerance of Difference: how far two rankings of a group disagree (arXiv 2508.02291), and equal widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.caller.arrays import Flags, Index, Scalars

LARGEST_SHARE = 0.99  # of a group's units that may be removed


def ranks(scores: Scalars) -> Index:
    """The 0-based rank of each score by rising value; equals keep their order.

    >>> ranks(np.array([3.0, 1.0, 2.0]))
    array([2, 0, 1])
    """
    result = np.empty(len(scores), dtype=np.int64)
    result[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return result


def tod_curve(propose: Scalars, protect: Scalars) -> Scalars:
    """ToD(k) = |{k lowest by propose} and {k highest by protect}| / k for k = 1 .. n, in O(n log n).

    A unit with ranks u and r is in both sets exactly from k = max(u + 1, n - r) on.

    >>> tod_curve(np.array([0.1, 0.2, 0.3, 0.4]), np.array([4.0, 3.0, 2.0, 1.0]))
    array([1., 1., 1., 1.])
    """
    n = len(propose)
    first = np.maximum(ranks(propose) + 1, n - ranks(protect))
    both = np.cumsum(np.bincount(first, minlength=n + 1)[1:])
    curve: Scalars = both / np.arange(1, n + 1)
    return curve


def balanced(
    keep: Flags,
    propose: Scalars,
    equal: Sequence[Sequence[Index]],
    larger: Sequence[Sequence[Index]] = (),
    floors: Sequence[tuple[Index, int]] = (),
    *,
    round_to: int = 1,
) -> Flags:
    """The kept units once all sites of each set in `equal` keep as many channels as the widest of them.

    A site is given by the unit of each of its channels (-1: always kept). In each pair of `larger`, the first keeps
    more channels than the second, to the next multiple of `round_to`. `floors` are sets of units, each with the least
    number that is kept. Units high by `propose` are restored first.

    >>> sites = np.array([0, 1, 2]), np.array([3, 4, 5])
    >>> balanced(np.array([True, True, False, True, False, False]), np.arange(6.0), [sites])
    array([ True,  True, False,  True, False,  True])
    """
    padded, before = np.append(keep, True), -1
    while before != padded.sum():
        before = padded.sum()
        for units, least in floors:
            _restore(padded, propose, units, least)
        for sites in equal:
            most = max(int(padded[units].sum()) for units in sites)
            for units in sites:
                _restore(padded, propose, units, most)
        for units, other in larger:
            if padded[units].sum() <= padded[other].sum():
                _restore(padded, propose, units, (int(padded[other].sum()) // round_to + 1) * round_to)
    return padded[:-1]


def _restore(padded: Flags, propose: Scalars, units: Index, count: int) -> None:
    """Keep removed units again, in place, until a site keeps at least `count` channels."""
    removed, channels = np.unique(units[~padded[units]], return_counts=True)
    order = np.argsort(-propose[removed], kind="stable")
    kept = padded[units].sum() + np.cumsum(channels[order]) - channels[order]
    padded[removed[order[kept < count]]] = True
