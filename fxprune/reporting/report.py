"""What was asked, what was achieved, and what was left whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from rich.console import Console
from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.files import replacing
from fxprune.errors import FxpruneError
from fxprune.reporting.comparison import Comparison, compared
from fxprune.reporting.html.page import page
from fxprune.reporting.records import Finetuning, MeasuredLatency, ReportRecord
from fxprune.reporting.tables import printed, tables
from fxprune.tracing.graph import ModelGraph


@dataclass(frozen=True, slots=True)
class Report(ReportRecord):
    """What `compress` or `apply` did: a `ReportRecord` that prints as tables, in a terminal or as a page."""

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML page that needs nothing else: no network, no other file.

        The file appears whole or not at all. Raises FxpruneError where it cannot be written.
        """
        text = page(self)
        with replacing(path, FxpruneError) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def compare(self, other: Report) -> Comparison:
        """This report beside another, of another plan for the same model, say; it prints as a table."""
        return compared(self, other)

    def __str__(self) -> str:
        return printed(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from tables(self)


def report(small: nn.Module) -> Report:
    """The report of a model that `compress` or `apply` made.

    Where parts of it were pruned, the first one's report: give another part, such as `small.backbone`, for its own.

    Raises FxpruneError where `small` is not such a model.
    """
    check(report, locals())
    for _, found in reported(small):
        return found
    raise FxpruneError(f"{type(small).__name__} has no report: it did not come from fxprune.compress or fxprune.apply")


def note_finetuning(small: nn.Module, done: Finetuning) -> None:
    """Add what fine-tuning did to the reports of a model, one for each part that was pruned."""
    for module, found in reported(small):
        module.meta["fxprune"] = module.meta["fxprune"] | {"report": replace(found, finetuned=done)}


def note_latency(small: nn.Module, measured: MeasuredLatency) -> None:
    """Add what was measured to the reports of a model, one for each part that was pruned."""
    for module, found in reported(small):
        module.meta["fxprune"] = module.meta["fxprune"] | {"report": replace(found, latency=measured)}


def reported(small: nn.Module) -> Iterator[tuple[ModelGraph, Report]]:
    """The graphs in a model that have a report, and these."""
    for module in small.modules():
        found = module.meta.get("fxprune", {}).get("report") if isinstance(module, ModelGraph) else None
        if isinstance(module, ModelGraph) and isinstance(found, Report):
            yield module, found
