"""The report of a pruned model, and the record that carries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from rich.console import Console
from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.files import replacing
from fxprune.errors import FxpruneError
from fxprune.planning.plan import Plan
from fxprune.reporting.comparison import Comparison, compared
from fxprune.reporting.html.page import page
from fxprune.reporting.records import ReportRecord
from fxprune.reporting.tables import printed, tables
from fxprune.tracing.graph import RECORD, History, ModelGraph, Record


@dataclass(frozen=True, slots=True)
class Report(ReportRecord):
    """A `ReportRecord` that prints as tables, on a terminal or as a page."""

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML page that loads nothing: no network, no other file.

        The file appears whole or not at all. Raises FxpruneError where it cannot be written.
        """
        with replacing(path, FxpruneError) as unfinished:
            unfinished.write_text(page(self), encoding="utf-8")

    def compare(self, other: Report) -> Comparison:
        """This report beside another, such as that of another plan for the same model; it prints as a table."""
        return compared(self, other)

    def __str__(self) -> str:
        return printed(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from tables(self)


@dataclass(frozen=True, slots=True)
class Pruned(Record):
    """The record of a pruned graph: the last plan, its report, and the history to make the graph again.

    `scores` says how the scores behind the plan were made, where they were given.
    """

    plan: Plan
    report: Report
    history: History
    scores: Mapping[str, Any] | None = None

    @property
    def refitted(self) -> str:
        """What changed the weights after channels were removed; empty where nothing did."""
        done = self.report.compensation
        ways = [f'compensate="{done.level}"'] if done else []
        return " and ".join([*ways, *(["fine-tuning"] if self.report.finetuned else [])])


def report(small: nn.Module) -> Report:
    """The report of a model that `compress` or `apply` made.

    Where parts of it were pruned, the first one's report: give another part, such as `small.backbone`, for its own.

    Raises FxpruneError where `small` is not such a model.
    """
    check(report, locals())
    for _, found in reported(small):
        return found
    raise FxpruneError(f"{type(small).__name__} has no report: it did not come from fxprune.compress or fxprune.apply")


def pruned_of(model: nn.Module) -> Pruned | None:
    """The record of a pruned graph; None for any other module."""
    found = model.meta.get(RECORD) if isinstance(model, ModelGraph) else None
    return found if isinstance(found, Pruned) else None


def with_report(graph: Any, **entries: Any) -> None:
    """Replace entries of a pruned graph's report."""
    record: Pruned = graph.meta[RECORD]
    graph.meta[RECORD] = replace(record, report=replace(record.report, **entries))


def reported(small: nn.Module) -> Iterator[tuple[ModelGraph, Report]]:
    """The pruned graphs in a model, and their reports."""
    for module in small.modules():
        if isinstance(module, ModelGraph) and (record := pruned_of(module)):
            yield module, record.report
