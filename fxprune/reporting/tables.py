"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fxprune.coupling.branch_units import SITE
from fxprune.errors import plural, visible
from fxprune.planning.budgets import DEFAULT_ALPHA
from fxprune.planning.plan import BUDGETS
from fxprune.reporting.records import ReportRecord, RouterReport
from fxprune.reporting.timings import Timing, milliseconds

SHOWN = 5  # of the largest layers


def plain(*texts: str, style: str = "") -> list[Text]:
    """Texts for a table, shown as they are: names in them are no markup."""
    return [Text(visible(text), style) for text in texts]


def table(
    columns: Sequence[str], rows: Iterable[Iterable[str]], title: str = "", justify: Literal["left", "right"] = "left"
) -> Table:
    """A table of plain texts; `justify` is of all columns but the first."""
    first, *others = plain(*columns)
    found = Table(Column(first), *(Column(name, justify=justify) for name in others))
    found.title = plain(title, style="table.title")[0] if title else None
    for row in rows:
        found.add_row(*plain(*row))
    return found


def printed(shown: Any) -> str:
    """A table, or anything else that rich prints, as plain text 120 characters wide."""
    console = Console(width=120, color_system=None, force_jupyter=False)
    with console.capture() as text:
        console.print(shown)
    return text.get().rstrip()


def brief(report: ReportRecord) -> str:
    """The summary of a report as a few lines of text."""
    lines = [f"report of {report.model} at {level_of(report)}"]
    for name, before, after, left in summary(report):
        figures = f"{before} -> {after}" if before else after
        lines.append(f"  {name}: {figures}" + (f" ({left})" if left else ""))
    lines.append(f"  {plural(len(report.groups), 'group')} in print(report), every layer in report.to_html(path)")
    return visible("\n".join(lines))


def tables(report: ReportRecord) -> Iterator[Any]:
    """The summary, the budget, the reasons for slowness, widths, experts, the largest layers, the layers left whole."""
    yield table(("", "before", "after", "left"), summary(report), f"{report.model} at {level_of(report)}", "right")
    yield from plain(*(str(line) for line in (report.budget, report.calibration) if line))
    yield from plain(*report.latency.explained()) if report.latency else []
    yield table(("group", "units", "layers (channels before -> after)"), _widths(report))
    if report.routers:
        yield table(("router", "experts", "for a token", "kept, by their use"), map(_experts, report.routers))
    if report.layers:
        yield table(("largest that remain", "type", "parameters", "MACs a sample", "of all"), _layers(report))
    for frozen in report.frozen:
        names = ", ".join(frozen.sites[:6]) + (", ..." if len(frozen.sites) > 6 else "")
        yield from plain(f"whole: {names}: {frozen.reason}")


def level_of(report: ReportRecord) -> str:
    """What a model was pruned to: the share that a budget left, the level, or else the share of its MACs."""
    if report.budget is not None:
        return f"{report.budget.achieved:.1%} of the {BUDGETS[report.budget.of]}"
    if report.alpha is None:
        return f"{report.macs_after / max(report.macs_before, 1):.1%} of the MACs"
    return f"alpha {report.alpha:g}{' (the default)' * (report.alpha == DEFAULT_ALPHA)}"


def summary(report: ReportRecord) -> Iterator[tuple[str, ...]]:
    """Rows of a name, and a figure before, after, and its share or a remark."""
    counts = [
        ("parameters", (report.params_before, report.params_after)),
        ("MACs a sample", (report.macs_before, report.macs_after)),
        ("weight bytes", report.weight_bytes),
        ("parameters of the whole", report.whole),
    ]
    for name, pair in counts:
        if pair:
            yield name, f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[1] / max(pair[0], 1):.1%}"
    yield from _branches(report)
    if report.latency:
        where = f"on {report.latency.device}, {plural(report.latency.threads, 'thread')}"
        for timed in report.latency.batches:
            yield f"batch of {timed.batch_size} {where}", _time(timed.before), _time(timed.after), f"{timed.left:.1%}"
    if found := report.evaluation:
        before = "" if found.before is None else f"{found.before:.4g}"
        yield found.name, before, f"{found.after:.4g}", ""
    proof = "not run" if report.error is None else f"{report.error:.1e}"
    yield "verify's error" + (", before fine-tuning" if report.finetuned else ""), "", proof, ""
    yield "captured by", "", report.captured, ""
    if done := report.compensation:
        layers = plural(done.refitted, "layer")
        after = "not measured" if done.after is None else done.shown(done.after)
        yield f"output's error, compensation: {done.level}", done.shown(done.before), after, layers
        if not done.is_share:
            yield f"  by the {done.measure}", "", "", ""
        best = min(done.compared, key=lambda name: done.compared[name], default="")
        for name, error in done.compared.items():
            taken = "taken" if name == best else ""
            yield f"  plan by {name}", "", done.shown(error), taken
    if tuned := report.finetuned:
        name, values = tuned.judged_by
        best = f"epoch {tuned.best} of {tuned.ran}"
        yield f"fine-tuning: {name}", f"{values[0]:.4g}", f"{values[tuned.best]:.4g}", best


def _branches(report: ReportRecord) -> Iterator[tuple[str, ...]]:
    """The number of residual branches before and after, and those that were removed, where they are units."""
    branches = {name.removeprefix(SITE): kept for name, (_, kept) in report.widths.items() if name.startswith(SITE)}
    removed = [name for name, kept in branches.items() if not kept]
    names = ", ".join(removed[:SHOWN]) + (f" and {len(removed) - SHOWN} more" if len(removed) > SHOWN else "")
    if branches:
        yield "branches", f"{len(branches)}", f"{len(branches) - len(removed)}", f"without {names}" if names else ""


def _time(timing: Timing) -> str:
    """The median, and half the distance of the quartiles."""
    return f"{milliseconds(timing.median)} ± {milliseconds((timing.high - timing.low) / 2)}"


def _widths(report: ReportRecord) -> Iterator[tuple[str, ...]]:
    for group in report.groups:
        if all(name.startswith(SITE) for name in group.sites):
            continue  # branches are in the summary
        sites = ", ".join(f"{name} {before}->{after}" for name, (before, after) in group.sites.items())
        yield group.name, f"{group.before} -> {group.after}", sites
        if group.inexact:
            yield "", "", f"inexact: {group.inexact}"


def _experts(router: RouterReport) -> tuple[str, ...]:
    """A row of the table of routers."""
    usage = router.usage or (0.0,) * router.experts
    order = sorted(router.kept, key=lambda expert: -usage[expert])
    names = ", ".join(f"{expert} ({usage[expert]:.0%})" if router.usage else str(expert) for expert in order[:SHOWN])
    more = f" and {len(order) - SHOWN} more" if len(order) > SHOWN else ""
    return router.router, f"{router.experts} -> {len(router.kept)}", str(router.chosen), names + more


def _layers(report: ReportRecord) -> Iterator[tuple[str, ...]]:
    for layer in report.layers[:SHOWN]:
        share = layer.macs[1] / max(report.macs_after, 1)
        yield layer.name, layer.kind, f"{layer.params[1]:,}", f"{layer.macs[1]:,}", f"{share:.1%}"
