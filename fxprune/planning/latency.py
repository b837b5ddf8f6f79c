"""A model's time under any plan, interpolated between the times of its nodes at a few widths on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.errors import plural
from fxprune.planning.widths import Products, Widths


@dataclass(frozen=True, slots=True, eq=False)
class Latency:
    """Seconds that a model takes under any plan: `rest`, and for each node a line through its measured times.

    Product i of `work` is a part of the work of `node[i]`: its flops, or the entries of its output where it has none.
    `works` and `seconds` (nodes, widths) hold every node's work and time at the widths that were timed. Below the
    narrowest, the time is constant; that of a node of a removed branch, whose work is zero, is zero.
    """

    widths: Widths
    work: Products
    node: Index
    works: Scalars
    seconds: Scalars
    rest: float
    device: str

    def __repr__(self) -> str:
        nodes, widths = self.seconds.shape
        whole = 1e3 * (self.rest + float(self.seconds[:, -1].sum()))
        return (
            f"<times of {plural(nodes, 'node')} at {plural(widths, 'width')} on {self.device}: {whole:.3g} ms in all>"
        )

    def estimate(self, keep: Flags) -> float:
        """Seconds of one run where the units `keep` are kept."""
        work = work_by_node(self.work.of(self.widths.under(keep)), self.node, len(self.seconds))
        here = (work > 0) | (self.works[:, -1] == 0)
        return self.rest + float(_interpolated(work, self.works, self.seconds)[here].sum())

    def arrays(self) -> dict[str, Any]:
        """The numbers, as arrays by their names."""
        own = {"node": self.node, "works": self.works, "seconds": self.seconds}
        return self.widths.arrays() | self.work.arrays("work_") | own

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any], rest: float, device: str) -> Latency:
        """The table that `arrays` were taken from."""
        widths, work = Widths.of_arrays(arrays), Products.of_arrays(arrays, "work_")
        return cls(widths, work, arrays["node"], arrays["works"], arrays["seconds"], rest, device)


def work_by_node(numbers: Index, node: Index, count: int) -> Scalars:
    """The sum of each node's products."""
    return np.bincount(node, weights=numbers, minlength=count).astype(np.float64)


def _interpolated(x: Scalars, works: Scalars, seconds: Scalars) -> Scalars:
    """For each row, the line through its points (rising works, seconds) at x, constant outside of them."""
    rows, last = np.arange(len(x)), works.shape[1] - 1
    right = np.clip((x[:, None] > works).sum(1), 1, last)
    span = works[rows, right] - works[rows, right - 1]
    part = np.where(span > 0, np.clip((x - works[rows, right - 1]) / np.where(span > 0, span, 1), 0, 1), 1)
    result: Scalars = seconds[rows, right - 1] * (1 - part) + seconds[rows, right] * part
    return result
