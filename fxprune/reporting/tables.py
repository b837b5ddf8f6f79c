"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxprune.errors import visible
from fxprune.reporting.records import Compensation, Finetuning, MeasuredLatency, ReportRecord, Timing, milliseconds

SHOWN = 5  # of the largest layers


def plain(*texts: str, style: str = "") -> list[Text]:
    """Texts for a table that are shown as they are, whatever names they hold."""
    return [Text(visible(text), style) for text in texts]


def printed(shown: Any) -> str:
    """What rich prints of it, as plain text 120 characters wide."""
    console = Console(width=120, no_color=True)
    with console.capture() as text:
        console.print(shown)
    return text.get().rstrip()


def tables(report: ReportRecord) -> Iterator[Any]:
    """What a report prints: the summary, the budget, the widths, the largest layers, and what stayed whole."""
    yield _summary(report)
    yield from [] if report.budget is None else plain(str(report.budget))
    yield from [] if report.latency is None else plain(*report.latency.explained())
    yield _widths(report)
    yield from [_layers(report)] if report.layers else []
    for frozen in report.frozen:
        names = ", ".join(frozen.sites[:6]) + (", ..." if len(frozen.sites) > 6 else "")
        yield from plain(f"whole: {names}: {frozen.reason}")


def level_of(report: ReportRecord) -> str:
    """What a report's plan is called by."""
    return "a plan" if report.alpha is None else f"alpha {report.alpha:g}"


def counted(report: ReportRecord) -> list[tuple[str, int, int]]:
    """What was counted, by its name: before and after."""
    rows = [
        ("parameters", report.params_before, report.params_after),
        ("MACs a sample", report.macs_before, report.macs_after),
    ]
    rows += [("weight bytes", *report.weight_bytes)] if report.weight_bytes else []
    return rows + ([("parameters of the whole", *report.whole)] if report.whole else [])


def _summary(report: ReportRecord) -> Table:
    table = Table(title=plain(f"{report.model} at {level_of(report)}", style="table.title")[0])
    for name in ("", "before", "after", "left"):
        table.add_column(name, justify="left" if not name else "right")
    for name, before, after in counted(report):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
    for row in _timed(report.latency) if report.latency else ():
        table.add_row(*plain(*row))
    proof = "not run" if report.error is None else f"{report.error:.1e}"
    table.add_row("verify's error" + (", before fine-tuning" if report.finetuned else ""), "", proof, "")
    table.add_row(*plain("captured by", "", report.captured, ""))
    if report.compensation:
        table.add_row(*plain(*_compensated(report.compensation)))
    if report.finetuned:
        table.add_row(*plain(*_tuned(report.finetuned)))
    return table


def _widths(report: ReportRecord) -> Table:
    table = Table("group", "units", "layers (channels before -> after)")
    for group in report.groups:
        sites = ", ".join(f"{name} {before}->{after}" for name, (before, after) in group.sites.items())
        table.add_row(*plain(group.name, f"{group.before} -> {group.after}", sites))
        if group.inexact:
            table.add_row(*plain("", "", f"inexact: {group.inexact}"))
    return table


def _layers(report: ReportRecord) -> Table:
    table = Table("largest that remain", "type", "parameters", "MACs a sample", "of all")
    for layer in report.layers[:SHOWN]:
        share = layer.macs[1] / max(report.macs_after, 1)
        counts = f"{layer.params[1]:,}", f"{layer.macs[1]:,}", f"{share:.1%}"
        table.add_row(*plain(layer.name, layer.kind, *counts))
    return table


def _timed(latency: MeasuredLatency) -> Iterator[tuple[str, str, str, str]]:
    """The lines of the summary on latency: the medians and half the distance of the quartiles, a batch size a line."""
    threads = f"{latency.threads} thread{'' if latency.threads == 1 else 's'}"
    for pair in latency.batches:
        name = f"batch of {pair.batch_size} on {latency.device}, {threads}"
        yield name, _time(pair.before), _time(pair.after), f"{pair.left:.1%}"


def _time(timing: Timing) -> str:
    return f"{milliseconds(timing.median)} ± {milliseconds((timing.high - timing.low) / 2)}"


def _compensated(done: Compensation) -> tuple[str, str, str, str]:
    """The line of the summary on compensation: the output's error without it and with it, and what was changed."""
    name = f"output's error, compensation: {done.level}"
    layers = f"{sum(layer.strength is not None for layer in done.layers) + len(done.filled)} layers"
    if done.before is None or done.after is None:
        return name, "", "not measured", layers
    return name, f"{done.before:.1%}", f"{done.after:.1%}", layers


def _tuned(done: Finetuning) -> tuple[str, str, str, str]:
    """The line of the summary on fine-tuning: the metric, or the validation loss, and the epoch that was kept."""
    name, values = ("metric", done.metrics) if done.metrics else ("validation loss", done.val_losses)
    return f"fine-tuning: {name}", f"{values[0]:.4g}", f"{values[done.best]:.4g}", f"epoch {done.best} of {done.ran}"
