"""Whether scores that come from a file are such that plans can be made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.caller.arguments import is_whole
from fxprune.caller.example import check_example
from fxprune.planning.widths import Products, Widths
from fxprune.tracing.settings import check_settings

if TYPE_CHECKING:
    from fxprune.planning.latency import Latency

_FLOATS, _INTEGERS = np.dtype(np.float64), np.dtype(np.int64)
_MANY = 1 << 31


def check_consistent(scores: Any) -> None:
    """Raise ValueError, TypeError or PlanError where a number in some scores points at nothing, or shapes disagree."""
    units = len(scores.propose)
    for name, array in (("propose", scores.propose), ("protect", scores.protect)):
        _check(array.shape == (units,) and array.dtype == _FLOATS and not np.isnan(array).any(), name)
    _check_groups(scores, units)
    _check_names(scores)
    for site in scores.sites:
        _check_range(site.units, -1, units, f"the units of {site.name}")
    for piece in scores.pieces:
        _check_range(piece, 0, units, "a piece")
        _check(len(piece) > 0, "a piece")
    if scores.channels is not None:
        _check_range(scores.channels, 0, 1 << 62, "channels")
        _check(len(scores.channels) == units, "channels")
    for moments in scores.moments.values():
        size = len(moments.mean)
        _check(moments.mean.ndim == 1 and moments.covariance.shape in ((size,), (size, size)), "moments")
    if scores.costs is not None:
        _check_products(scores.costs.widths, (scores.costs.params, scores.costs.flops), units)
        _check(0 < scores.costs.samples < _MANY, "costs")
    if scores.times is not None:
        _check_times(scores.times, units)
    _check(is_whole(scores.min_keep, below=_MANY) and is_whole(scores.round_to, below=_MANY), "min_keep and round_to")
    check_settings(scores.settings)
    check_example(scores.example)


def _check(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(f"{what}: its shapes or numbers contradict the rest of the file")


def _check_range(array: Any, low: int, high: int, what: str) -> None:
    """Raise where an array is no vector of integers from `low` up to below `high`."""
    _check(array.ndim == 1 and array.dtype == _INTEGERS, what)
    _check(array.size == 0 or (array.min() >= low and array.max() < high), what)


def _check_groups(scores: Any, units: int) -> None:
    """Groups follow each other, and hold all units."""
    ends = [0, *(end for _, _, end in scores.groups)]
    starts = [*(start for _, start, _ in scores.groups), units]
    _check(ends == starts and all(start < end for _, start, end in scores.groups), "groups")


def _check_names(scores: Any) -> None:
    names = {site.name for site in scores.sites}
    _check(len(names) == len(scores.sites), "sites")
    _check(all(names.issuperset(each) and each for each in (*scores.balanced, *scores.larger)), "balanced")
    _check(all(len(pair) == 2 for pair in scores.larger), "larger")


def _check_products(widths: Widths, tables: Iterable[Products], units: int) -> None:
    """Widths count units that there are, and products multiply widths that there are."""
    count = len(widths.fixed)
    _check_range(widths.fixed, 0, 1 << 62, "widths")
    _check_range(widths.units, 0, units, "widths")
    _check_range(widths.starts, 0, len(widths.units) + 1, "widths")
    _check(len(widths.starts) == count + 1 and (np.diff(widths.starts) >= 0).all(), "widths")
    _check(widths.starts[0] == 0 and widths.starts[-1] == len(widths.units), "widths")
    for table in tables:
        rows = len(table.factor)
        _check_range(table.factor, -(1 << 62), 1 << 62, "products")
        for array, low in ((table.axes, 0), (table.vanishing, -1)):
            _check(array.ndim == 2 and len(array) == rows, "products")
            _check_range(array.reshape(-1), low, count, "products")


def _check_times(times: Latency, units: int) -> None:
    _check_products(times.widths, (times.work,), units)
    _check_range(times.node, 0, len(times.seconds), "times")
    _check(len(times.node) == len(times.work.factor), "times")
    _check(times.seconds.ndim == 2 and times.seconds.shape == times.works.shape and times.seconds.size, "times")
    _check(times.seconds.dtype == times.works.dtype == _FLOATS, "times")
