"""Measured times of an original and of its smaller model, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxprune.errors import plural, visible

GAIN = 0.05  # share of the original's time; a smaller gain is none


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds for one batch: the median and the quartiles of `runs` measurements, taken in `turns` turns."""

    median: float
    low: float
    high: float
    turns: int
    runs: int


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """The times of the original and of the smaller model on batches of one size, taken in turns.

    >>> pair = BatchLatency(1, Timing(0.2, 0.19, 0.21, 5, 20), Timing(0.1, 0.09, 0.12, 5, 20))
    >>> pair.speedup, pair.left, pair.verdict
    (2.0, 0.5, 'faster')
    """

    batch_size: int
    before: Timing
    after: Timing

    @property
    def speedup(self) -> float:
        """The original's time over the smaller model's."""
        return self.before.median / max(self.after.median, 1e-12)

    @property
    def left(self) -> float:
        """The smaller model's time over the original's."""
        return self.after.median / max(self.before.median, 1e-12)

    @property
    def verdict(self) -> Literal["faster", "unclear", "not faster"]:
        """Whether the smaller model is faster.

        "not faster" where its median is less than 5 % below the original's; otherwise "faster" where the interquartile
        ranges are disjoint, and "unclear" where they overlap.
        """
        if self.left > 1 - GAIN:
            return "not faster"
        return "faster" if self.after.high < self.before.low else "unclear"


@dataclass(frozen=True, slots=True)
class MeasuredLatency:
    """The result of `measure_latency`: the times at each batch size, on one device with `threads` CPU threads.

    `reasons` explain why the smaller model is not faster, at the first batch size where it is not.
    """

    device: str
    threads: int
    batches: tuple[BatchLatency, ...]
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"measured on {self.device}, {plural(self.threads, 'thread')}"]
        for pair in self.batches:
            before, after = (f"{milliseconds(t.median)} ({_spread(t)})" for t in (pair.before, pair.after))
            lines.append(f"  batch {pair.batch_size}: {before} -> {after}, {pair.speedup:.2f} x")
        return visible("\n".join([*lines, *(f"  {line}" for line in self.explained())]))

    __repr__ = __str__

    def explained(self) -> tuple[str, ...]:
        """One sentence for each place where the smaller model is not faster, and for each reason; empty if none."""
        said: list[str] = []
        if where := self._sizes("unclear"):
            said.append(f"the spread at batch size {where} is too wide to tell: measure on a machine that is idle")
        if where := self._sizes("not faster"):
            said.append(f"not faster at batch size {where}")
        return *said, *self.reasons

    def _sizes(self, verdict: str) -> str:
        """The batch sizes with one verdict, as text."""
        return " and ".join(str(pair.batch_size) for pair in self.batches if pair.verdict == verdict)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three significant digits.

    >>> milliseconds(0.0123456), milliseconds(1.5)
    ('12.3 ms', '1,500 ms')
    """
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _spread(timing: Timing) -> str:
    return f"{milliseconds(timing.low).removesuffix(' ms')} to {milliseconds(timing.high)}"
