"""A report as one HTML page, which needs no network and no other file."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from fxprune.errors import visible
from fxprune.planning.plan import BUDGETS
from fxprune.reporting.html.drawing import times
from fxprune.reporting.html.groups import groups_section
from fxprune.reporting.html.markup import Cell, Row, card, note, number, share, short, table, text, tile
from fxprune.reporting.records import (
    BatchLatency,
    Compensation,
    Finetuning,
    LayerReport,
    MeasuredLatency,
    ReportRecord,
    Timing,
    milliseconds,
)
from fxprune.reporting.tables import level_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
TIMES = (
    ("batch", "figure"),
    ("before", "figure"),
    ("after", "figure"),
    ("faster", "figure"),
    ("of the original", "wide"),
)
LAYERS = (
    ("layer", ""), ("type", "wide"), ("parameters before", "figure wide"), ("after", "figure"),
    ("MACs before", "figure wide"), ("after", "figure"), ("of all", "figure"),
)  # fmt: skip
FOOT = (
    "Multiply-accumulates are those of matrix products, convolutions, attention and recurrent layers, as torch's flop "
    "counter counts them, for one sample; biases, norms and element-wise operations count as zero. Weight bytes are "
    "those of all parameters and buffers. verify's error is the largest difference between the plain removal and the "
    "original with the removed units zeroed, in shares of the output's scale."
)


def page(report: ReportRecord) -> str:
    """The page as text."""
    how = _how(report)
    sections = "".join(part for part in _sections(report) if part)
    return visible(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(report.model)}, {escape(how)}: fxprune</title>\n"
        f"<style>\n{_text('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(report.model)}<small>{escape(how)}</small></h1>"
        f"{_lead(report)}</header>\n"
        f"<main>{sections}</main>\n<footer><p>{escape(FOOT)}</p></footer>\n"
        f"<script>\n{_text('page.js')}</script>\n</body>\n</html>\n"
    )


def _how(report: ReportRecord) -> str:
    """What was done, in a word."""
    if report.budget:
        return f"pruned to {report.budget.achieved:.1%} of the {BUDGETS.get(report.budget.of, report.budget.of)}"
    return f"pruned at {level_of(report)}" if report.alpha is not None else "pruned by a plan"


def _text(name: str) -> str:
    """A file of this package."""
    return (files("fxprune.reporting.html") / name).read_text(encoding="utf-8")


def _lead(report: ReportRecord) -> str:
    said = [str(report.budget)] if report.budget else []
    said += [f"captured by {report.captured}"]
    if report.whole:
        before, after = report.whole
        said += [f"a part of a model: the whole went from {before:,} to {after:,} parameters"]
    return f'<p class="lead">{escape("; ".join(said))}</p>'


def _sections(report: ReportRecord) -> Iterator[str]:
    yield f'<div class="tiles">{"".join(_tiles(report))}</div>'
    yield _latency(report.latency) if report.latency else ""
    yield groups_section(report)
    yield _layers(report) if report.layers else ""
    yield _frozen(report) if report.frozen else ""


def _tiles(report: ReportRecord) -> Iterator[str]:
    """The figures that matter most."""
    yield _counted("Parameters", report.params_before, report.params_after)
    yield _counted("MACs a sample", report.macs_before, report.macs_after)
    yield _counted("Weight bytes", *report.weight_bytes, unit="B") if report.weight_bytes else ""
    for pair in report.latency.batches if report.latency else ():
        detail = f"of {milliseconds(pair.before.median)}, {pair.speedup:.2f} x as fast"
        yield tile(f"Latency, batch of {pair.batch_size}", milliseconds(pair.after.median), detail, pair.left)
    proof = "not run" if report.error is None else f"{report.error:.1e}"
    yield tile("verify's error", proof, "before fine-tuning" if report.finetuned else "of the plain removal")
    yield _compensated(report.compensation) if report.compensation else ""
    yield _tuned(report.finetuned) if report.finetuned else ""


def _counted(name: str, before: int, after: int, unit: str = "") -> str:
    left = after / max(before, 1)
    detail = f"of {short(before)}{unit}, {left:.1%} left"
    return tile(name, short(after) + unit, detail, left, hint=f"{before:,} to {after:,}")


def _compensated(done: Compensation) -> str:
    shown = "not measured" if done.after is None else f"{done.after:.1%}"
    before = "" if done.before is None else f"from {done.before:.1%}; "
    return tile("Output's error", shown, f"{before}compensation: {done.level}")


def _tuned(done: Finetuning) -> str:
    name, values = ("metric", done.metrics) if done.metrics else ("validation loss", done.val_losses)
    detail = f"from {values[0]:.4g}, epoch {done.best} of {done.ran}"
    return tile(f"Fine-tuned, {name}", f"{values[done.best]:.4g}", detail)


def _latency(found: MeasuredLatency) -> str:
    """The times at every batch size, and why where they did not fall."""
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    said = (
        f"Measured on {found.device} with {threads}, the two models in turns; medians, and the quartiles as whiskers."
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in found.explained())
    warning = f'<div class="warning"><ul>{lines}</ul></div>' if lines else ""
    return card("Latency", note(said) + table(TIMES, map(_pair, found.batches)) + warning)


def _pair(pair: BatchLatency) -> Row:
    return Row((
        number(pair.batch_size), _time(pair.before), _time(pair.after), number(pair.speedup, f"{pair.speedup:.2f} x"),
        Cell(times(pair), pair.left, "wide"),
    ))  # fmt: skip


def _time(timing: Timing) -> Cell:
    spread = f"{milliseconds(timing.low).removesuffix(' ms')} to {milliseconds(timing.high)}"
    shown = f'{milliseconds(timing.median)}<br><span class="note">{spread}</span>'
    return Cell(shown, timing.median, "figure")


def _layers(report: ReportRecord) -> str:
    """The largest layers that remain."""
    rows = (_layer(layer, report.macs_after) for layer in report.layers)
    said = "Those that have the most parameters or the most work in what remains."
    return card("Largest layers that remain", note(said) + table(LAYERS, rows))


def _layer(layer: LayerReport, whole: int) -> Row:
    before, after = layer.params
    return Row((
        text(layer.name, "name"), text(layer.kind, "wide"), number(before, classes="wide"), number(after),
        number(layer.macs[0], classes="wide"), number(layer.macs[1]), share(layer.macs[1], whole),
    ))  # fmt: skip


def _frozen(report: ReportRecord) -> str:
    """What stayed whole, by reason."""
    entries = "".join(
        f"<dt>{escape(frozen.reason)}</dt><dd><code>{escape(', '.join(frozen.sites))}</code></dd>"
        for frozen in report.frozen
    )
    return card("What stayed whole, and why", f"<dl>{entries}</dl>")
