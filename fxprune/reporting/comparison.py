"""Two reports side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fxprune.reporting.records import ReportRecord
from fxprune.reporting.tables import level_of, plain, printed


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the original and of two smaller models; None where it is not known."""

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
class Widths:
    """The units of one group: of the original, and those that stay in either; None where it is no group there."""

    name: str
    before: int
    first: int | None
    second: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `Report.compare` gives: two models by name, their figures, and the groups that keep different widths.

    `alike` is the number of groups that keep as many units in both.
    """

    first: str
    second: str
    figures: tuple[Figure, ...]
    groups: tuple[Widths, ...]
    alike: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain dicts, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        return printed(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        columns = plain("before", self.first, self.second)
        title = plain(f"{self.first} | {self.second}", style="table.title")[0]
        figures = Table("", *map(Column, columns), "second / first", title=title)
        for figure in self.figures:
            figures.add_row(*plain(*figure.cells()))
        yield figures
        if self.groups:
            groups = Table("units of group", *map(Column, columns))
            for group in self.groups:
                groups.add_row(*plain(group.name, *map(_count, (group.before, group.first, group.second))))
            yield groups
        yield f"{self.alike} group{'' if self.alike == 1 else 's'} of the same width in both"


def compared(first: ReportRecord, second: ReportRecord) -> Comparison:
    """Two reports side by side."""
    groups = tuple(_widths(first, second))
    different = tuple(group for group in groups if group.first != group.second)
    one, two = (f"{report.model} at {level_of(report)}" for report in (first, second))
    return Comparison(one, two, tuple(_figures(first, second)), different, len(groups) - len(different))


def _figures(first: ReportRecord, second: ReportRecord) -> Iterator[Figure]:
    """The numbers that either report has."""
    found = [dict(_numbers(report)) for report in (first, second)]
    for name in dict.fromkeys((*found[0], *found[1])):
        one, two = (numbers.get(name) for numbers in found)
        before = next((entry[0] for entry in (one, two) if entry and entry[0] is not None), None)
        shown_as = next(entry[2] for entry in (one, two) if entry)
        yield Figure(name, before, one and one[1], two and two[1], shown_as)


Number = tuple[str, tuple[float | None, float | None, str]]


def _numbers(report: ReportRecord) -> Iterator[Number]:
    """What a report knows: a name, what it was before and is after, and how it is written."""
    yield "parameters", (report.params_before, report.params_after, ",.0f")
    yield "MACs a sample", (report.macs_before, report.macs_after, ",.0f")
    if report.weight_bytes:
        yield "weight bytes", (*report.weight_bytes, ",.0f")
    for pair in report.latency.batches if report.latency else ():
        yield f"ms, batch of {pair.batch_size}", (1e3 * pair.before.median, 1e3 * pair.after.median, ",.3g")
    if report.error is not None:
        yield "verify's error", (None, report.error, ".1e")
    done, tuned = report.compensation, report.finetuned
    if done and done.after is not None:
        yield "output's error", (0.0, done.after, ".2%")
    if tuned:
        name, values = ("metric", tuned.metrics) if tuned.metrics else ("validation loss", tuned.val_losses)
        yield f"{name}, fine-tuned", (None, values[tuned.best], ".4g")


def _widths(first: ReportRecord, second: ReportRecord) -> Iterator[Widths]:
    """Every group of either report."""
    one, two = ({group.name: group for group in report.groups} for report in (first, second))
    for name in dict.fromkeys((*one, *two)):
        before = next(groups[name].before for groups in (one, two) if name in groups)
        yield Widths(name, before, *(groups[name].after if name in groups else None for groups in (one, two)))


def _count(count: int | None) -> str:
    return "" if count is None else str(count)
