"""Two reports side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from fxprune.errors import plural
from fxprune.reporting.records import ReportRecord
from fxprune.reporting.tables import level_of, plain, printed, table


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the original and of two smaller models; None where it is not known."""

    name: str
    before: float | None
    first: float | None
    second: float | None
    shown_as: str = ",.0f"

    def cells(self) -> tuple[str, ...]:
        """The row of a table: name, the three numbers, and the second over the first."""
        numbers = ("" if n is None else format(n, self.shown_as) for n in (self.before, self.first, self.second))
        ratio = f"{self.second / self.first:.2f}" if self.first and self.second is not None else ""
        return self.name, *numbers, ratio


@dataclass(frozen=True, slots=True)
class GroupWidths:
    """The units of one group in the original and in two smaller models; None where that has no such group."""

    name: str
    before: int
    first: int | None
    second: int | None

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        return self.name, *("" if n is None else str(n) for n in (self.before, self.first, self.second))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `Report.compare`: two models by name, their figures, and the groups that keep different widths.

    `alike` is the number of groups that keep as many units in both.
    """

    first: str
    second: str
    figures: tuple[Figure, ...]
    groups: tuple[GroupWidths, ...]
    alike: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain dicts, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: Any) -> Any:
        models = ("before", self.first, self.second)
        rows = (figure.cells() for figure in self.figures)
        yield table(("", *models, "second / first"), rows, f"{self.first} | {self.second}")
        if self.groups:
            yield table(("units of group", *models), (group.cells() for group in self.groups))
        yield from plain(f"{plural(self.alike, 'group')} of the same width in both")


def compared(first: ReportRecord, second: ReportRecord) -> Comparison:
    """Two reports side by side."""
    groups = tuple(_widths(first, second))
    different = tuple(group for group in groups if group.first != group.second)
    one, two = (f"{report.model} at {level_of(report)}" for report in (first, second))
    return Comparison(one, two, tuple(_figures(first, second)), different, len(groups) - len(different))


def _figures(first: ReportRecord, second: ReportRecord) -> Iterator[Figure]:
    """The figures that either report has."""
    one, two = ({figure.name: figure for figure in _figures_of(report)} for report in (first, second))
    for name in dict.fromkeys((*one, *two)):
        figures = [one.get(name), two.get(name)]
        before = next((figure.before for figure in figures if figure and figure.before is not None), None)
        after, other = (figure.first if figure else None for figure in figures)
        yield Figure(name, before, after, other, next(figure.shown_as for figure in figures if figure))


def _figures_of(report: ReportRecord) -> Iterator[Figure]:
    """The figures of one report, as those of its first model."""
    yield Figure("parameters", report.params_before, report.params_after, None)
    yield Figure("MACs a sample", report.macs_before, report.macs_after, None)
    if report.weight_bytes:
        yield Figure("weight bytes", *report.weight_bytes, None)
    for pair in report.latency.batches if report.latency else ():
        times = (1e3 * pair.before.median, 1e3 * pair.after.median)
        yield Figure(f"ms, batch of {pair.batch_size}", *times, None, ",.3g")
    if report.error is not None:
        yield Figure("verify's error", None, report.error, None, ".1e")
    if report.compensation and report.compensation.after is not None:
        shown_as = ".2%" if report.compensation.is_share else ".3g"
        yield Figure("output's error", None, report.compensation.after, None, shown_as)
    if found := report.evaluation:
        yield Figure(found.name, found.before, found.after, None, ".4g")
    if report.finetuned:
        name, values = report.finetuned.judged_by
        yield Figure(f"{name}, fine-tuned", None, values[report.finetuned.best], None, ".4g")


def _widths(first: ReportRecord, second: ReportRecord) -> Iterator[GroupWidths]:
    """Every group of either report."""
    one, two = ({group.name: group for group in report.groups} for report in (first, second))
    for name, group in (one | two).items():
        yield GroupWidths(
            name,
            one.get(name, group).before,
            *(groups[name].after if name in groups else None for groups in (one, two)),
        )
