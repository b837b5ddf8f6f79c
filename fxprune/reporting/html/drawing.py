"""Coordinates of the drawings on a report's page: shares of the axes in units of the SVG's view box."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.reporting.widths import LayerWidth

WIDTH, HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 308, 14, 186  # of the area between the axes
BAR = 12  # height of a bar of time


def x(share: float) -> float:
    """The position at a share of the horizontal axis."""
    return LEFT + share * (RIGHT - LEFT)


def y(share: float) -> float:
    """The position at a share of the vertical axis, which points up.

    >>> x(0), y(0), y(1)
    (44, 186, 14)
    """
    return BOTTOM - min(share, 1.0) * (BOTTOM - TOP)


def count_ticks(n: int) -> list[tuple[float, str]]:
    """Ticks at quarters of a number of units: (share of the axis, label)."""
    return [(mark / n, f"{mark:,}") for mark in sorted({0, n // 4, n // 2, 3 * n // 4, n})]


def value_ticks(top: float) -> list[tuple[float, str]]:
    """Ticks at both ends and the middle of an axis from 0 to `top`."""
    return [(share, f"{top * share:.3g}") for share in (0.0, 0.5, 1.0)]


def rounded_up(*values: float) -> float:
    """The smallest of a few round numbers that is at least the largest value.

    >>> rounded_up(0.01, 0.07), rounded_up(0.9)
    (0.1, 1.0)
    """
    return next((top for top in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8) if max(values) <= top), 1.0)


def bars(widths: Sequence[LayerWidth], part: str, top: int | None = None) -> str:
    """The path of upright bars, one unit wide and 100 high, side by side: one for each layer.

    `part` of a bar is what is "kept" of a layer, what is "removed", which lies above it, or the "whole" of a layer that
    cannot be pruned. The height stands for `top` channels, or else for all channels of the layer.

    >>> layers = [LayerWidth("a", 8, 4, True), LayerWidth("b", 8, 8, False)]
    >>> bars(layers, "removed"), bars(layers, "whole", top=16)
    ('M0.1 50V0H0.9V50z', 'M1.1 100V50H1.9V100z')
    """
    spans = {"kept": lambda w: (0, w.after), "removed": lambda w: (w.after, w.before), "whole": lambda w: (0, w.before)}
    path = ""
    for place, width in enumerate(widths):
        low, high = (100 - 100 * n / max(top or width.before, 1) for n in spans[part](width))
        if low > high and width.prunable is not (part == "whole"):
            path += f"M{place + 0.1:.7g} {low:.3g}V{high:.3g}H{place + 0.9:.7g}V{low:.3g}z"
    return path
