"""Curves: how far a model's outputs move by pruning one group alone, and the order of removal that follows."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.planning.allocation import Allocation
from fxprune.planning.widths import Arrays

CHUNKS = 32  # steps in which the units of a group are removed


@dataclass(frozen=True, slots=True, eq=False)
class Curves(Arrays):
    """Measured divergences of the outputs, for groups that are pruned alone.

    Curve i is that of `bundles(...)[i]` and has the points `starts[i]` to `starts[i + 1]`: after the removal of its
    first `depths` units, the outputs have moved by `values`. `order` holds the units of all curves, each curve's in the
    order of their removal.
    """

    starts: Index
    depths: Index
    values: Scalars
    order: Index

    def of(self, bundle: int) -> tuple[Index, Scalars]:
        """The depths and the divergences of one curve, from the unpruned model on; divergences never fall.

        >>> Curves(np.array([0, 2]), np.array([2, 3]), np.array([0.3, 0.2]), np.arange(4)).of(0)
        (array([0, 2, 3]), array([0. , 0.3, 0.3]))
        """
        own = slice(self.starts[bundle], self.starts[bundle + 1])
        return np.append(0, self.depths[own]), np.maximum.accumulate(np.append(0.0, self.values[own]))

    def late(self) -> Scalars:
        """The place of each unit in `order`: a ranking of the units of every group."""
        late = np.empty(len(self.order))
        late[self.order] = np.arange(len(self.order))
        return late


def bundles(allocation: Allocation) -> list[Index]:
    """The bundles of groups: for each bundle its units, in the order of their removal.

    A bundle is a single group, or all groups whose layers must keep equal numbers, or one more than another.
    """
    number = np.repeat(np.arange(len(allocation.sizes)), allocation.sizes)
    ends = [np.zeros((2, 0), dtype=np.int64)]
    for sites in (*allocation.equal, *allocation.larger):
        tied = np.unique(np.concatenate([number[units[units >= 0]] for units in sites]))
        ends.append(np.stack([tied[:-1], tied[1:]]))
    count, pairs = len(allocation.sizes), np.concatenate(ends, 1)
    net = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(count, count))
    bundle = connected_components(net, directed=False)[1][number]  # numbered by their first groups
    late = allocation.late()
    by_bundle = (np.flatnonzero(bundle == own) for own in range(int(bundle.max(initial=-1)) + 1))
    return [units[np.argsort(late[units], kind="stable")] for units in by_bundle]


def measured_levels(curves: Curves, found: Sequence[Index], cost: Callable[[Flags], float]) -> Scalars:
    """The place of each unit in the order of removal, from 0 to 1, inf where it is never removed.

    The units removed next are those of the curve that rises least per cost that they save. Curves are taken as additive
    and convex, as in the method of Lagrange multipliers; savings are counted anew after each step. `found` are the
    bundles of the curves.
    """
    order, units = np.split(curves.order, np.cumsum([len(own) for own in found])[:-1]), len(curves.order)
    level, keep, places = np.full(units, np.inf), np.ones(units, dtype=np.bool_), 0
    waiting = [_steps(order[i], *curves.of(i)) for i in range(len(order))]
    now = cost(keep)

    def rate(bundle: int) -> float:
        """Movement per cost saved: of a bundle's next step, or of several if constraints keep the first one's units."""
        less, moved, saved = keep.copy(), 0.0, 0.0
        for step, slope in waiting[bundle]:
            less[step] = False
            moved, saved = moved + slope * len(step), now - cost(less)
            if saved > 0:
                break
        return moved / max(saved, 1e-9)

    heap = [(rate(i), i) for i in range(len(order)) if waiting[i]]
    heapq.heapify(heap)
    while heap:
        _, bundle = heap[0]
        current = rate(bundle)  # others were removed since: it saves less now
        if len(heap) > 1 and current > min(heap[1:3])[0]:
            heapq.heapreplace(heap, (current, bundle))
            continue
        step, _ = waiting[bundle].pop(0)
        keep[step] = False
        now, places = cost(keep), places + 1
        level[step] = places
        if waiting[bundle]:
            heapq.heapreplace(heap, (rate(bundle), bundle))
        else:
            heapq.heappop(heap)
    return level / max(places, 1)


def _steps(units: Index, depths: Index, values: Scalars) -> list[tuple[Index, float]]:
    """The units of a curve in steps, each with the slope of the curve's lower convex hull there."""
    corners = [0]
    while corners[-1] < len(depths) - 1:
        here = corners[-1]
        slopes = (values[here + 1 :] - values[here]) / (depths[here + 1 :] - depths[here])
        corners.append(here + 1 + int(np.flatnonzero(slopes == slopes.min())[-1]))
    size, found = -(-len(units) // CHUNKS), list[tuple[Index, float]]()
    for here, there in itertools.pairwise(corners):
        slope = float((values[there] - values[here]) / (depths[there] - depths[here]))
        starts = range(depths[here], depths[there], size)
        found += [(units[start : min(start + size, depths[there])], slope) for start in starts]
    return found
