"""The rows of a sweep: which of them no other beats, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from fxprune.caller.files import replacing
from fxprune.errors import FxpruneError, plural
from fxprune.reporting.tables import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150


@dataclass(frozen=True, slots=True)
class Row:
    """One model of a sweep, named after the asked level, with its costs, accuracy (or metric) and time."""

    name: str
    alpha: float | None
    params: int
    macs: int
    accuracy: float
    milliseconds: float | None = None
    on_front: bool = False


def with_front(rows: Sequence[Row]) -> list[Row]:
    """The rows; `on_front` is set for each that no other row beats in accuracy, MACs and time.

    >>> rows = [Row("a", 0, 9, 90, 0.9), Row("b", 0, 8, 80, 0.9), Row("c", 0, 7, 70, 0.5)]
    >>> [row.on_front for row in with_front(rows)]
    [False, True, True]
    """
    front = unbeaten([(row.accuracy, -row.macs, -(row.milliseconds or 0.0)) for row in rows])
    return [replace(row, on_front=on_front) for row, on_front in zip(rows, front, strict=True)]


def unbeaten(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """For each point, whether no other is at least as large in all entries and larger in one.

    >>> unbeaten([(1, 2), (2, 2), (3, 1)])
    [False, True, True]
    """
    return [
        not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in points)
        for own in points
    ]


def table(rows: Sequence[Row], metric: str = "accuracy", batch_size: int = 0) -> Table:
    """Every row, with its share of the first, the original; those on the front have a star.

    `batch_size` is that of the times, 0 where none were taken.
    """
    timed = f"\nms: of {plural(batch_size, 'sample')} in one batch" if batch_size else ""
    found = Table(caption=f"*: no other is at least as accurate, small and fast, and better in one{timed}")
    for name in ("asked", "alpha", "parameters", "MACs", "ms", metric, "front"):
        found.add_column(*plain(name), justify="left" if name == "asked" else "right")
    first = rows[0]
    for row in rows:
        found.add_row(
            *plain(row.name),
            "" if row.alpha is None else f"{row.alpha:.3g}",
            f"{row.params:,} ({row.params / max(first.params, 1):.0%})",
            f"{row.macs:,} ({row.macs / max(first.macs, 1):.0%})",
            "" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            f"{row.accuracy:.4f}",
            "*" if row.on_front else "",
        )
    return found


def plot(rows: Sequence[Row], path: Path, metric: str = "accuracy") -> None:
    """Accuracy against MACs and, where it was measured, time; rows on the front are filled. The file appears whole."""
    from matplotlib.figure import Figure

    panels: dict[str, Callable[[Row], float]] = {"kept MACs (%)": lambda row: 100 * row.macs / max(rows[0].macs, 1)}
    if all(row.milliseconds is not None for row in rows):
        panels["milliseconds per batch"] = lambda row: row.milliseconds or 0.0
    figure = Figure(figsize=(6.5 * len(panels), 4.8), layout="constrained")
    for axes, (label, cost) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, rows, cost)
        axes.set(xlabel=label, ylabel=metric)
    with replacing(path, FxpruneError) as unfinished:
        figure.savefig(unfinished, dpi=DPI)


def _draw(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float]) -> None:
    """One panel: a dot and a name per row, and a line through the best of the panel."""
    front = unbeaten([(row.accuracy, -cost(row)) for row in rows])
    best = sorted((row for row, is_best in zip(rows, front, strict=True) if is_best), key=cost)
    axes.plot([cost(row) for row in best], [row.accuracy for row in best], color="0.7", linewidth=1, zorder=1)
    for row, height in zip(rows, heights(rows, cost), strict=True):
        fill = "tab:blue" if row.on_front else "white"
        axes.scatter(cost(row), row.accuracy, s=42, color=fill, edgecolors="tab:blue", zorder=2)
        axes.annotate(row.name, (cost(row), row.accuracy), (5, height), textcoords="offset points", fontsize=8)
    axes.margins(y=0.15)
    axes.set(xlim=(0, 1.15 * max(map(cost, rows))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def heights(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[int]:
    """How many points above its dot the name of each row stands, so that names of dots close together do not overlap.

    From left to right, the first name stands below its dot and the following ones above, each above the one before.

    >>> rows = [Row("a", 0, 9, 90, 0.9), Row("b", 0, 8, 80, 0.9), Row("c", 0, 7, 20, 0.5)]
    >>> heights(rows, lambda row: row.macs)
    [6, -9, -9]
    """
    accuracies = [row.accuracy for row in rows]
    width, height = 0.15 * max(map(cost, rows)), 0.06 * (max(accuracies) - min(accuracies))
    placed: dict[int, int] = {}
    for index in sorted(range(len(rows)), key=lambda index: cost(rows[index])):
        close = [
            at
            for other, at in placed.items()
            if cost(rows[index]) - cost(rows[other]) < width and abs(accuracies[other] - accuracies[index]) <= height
        ]
        placed[index] = max(6, max(close) + 10) if close else -9
    return [placed[index] for index in range(len(rows))]
