"""A report as one HTML page that loads nothing: no network, no other file."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.errors import plural, visible
from fxprune.planning.plan import BUDGETS
from fxprune.reporting.html import drawing
from fxprune.reporting.records import ReportRecord
from fxprune.reporting.tables import level_of
from fxprune.reporting.timings import milliseconds
from fxprune.reporting.widths import layer_widths, odd_widths


def page(report: ReportRecord) -> str:
    """The page as text."""
    widths, pruned = layer_widths(report), any(group.after < group.before for group in report.groups)
    named = {"title": _title(report), "stem": _stem(report), "style": _text("page.css"), "script": _text("page.js")}
    known = {"report": report, "widths": widths, "odd": odd_widths(widths), "pruned": pruned}
    return visible(ENVIRONMENT.get_template("page.html").render(known, **named))


def _title(report: ReportRecord) -> str:
    """How the model was pruned."""
    if report.budget:
        return f"pruned to {report.budget.achieved:.1%} of the {BUDGETS[report.budget.of]}"
    return f"pruned at {level_of(report)}" if report.alpha is not None else "pruned by a plan"


def _stem(report: ReportRecord) -> str:
    """A file's name for the model, without its ending."""
    file = report.provenance and report.provenance.file
    name = Path(file).stem if file else re.sub(r"\W+", "-", report.model).lower()
    return name.strip("-") or "small"


def figure(value: float, name: str) -> str:
    """A figure of quality: a share of right answers in percent, any other figure with four significant digits.

    >>> figure(0.8125, "accuracy"), figure(81.25, "accuracy"), figure(0.8125, "loss")
    ('81.2%', '81.25', '0.8125')
    """
    return f"{value:.1%}" if "accuracy" in name and 0 <= value <= 1 else f"{value:.4g}"


def _text(name: str) -> str:
    """A file of this package."""
    return (files("fxprune.reporting.html") / name).read_text(encoding="utf-8")


def short(count: float, unit: str = "") -> str:
    """A count with three significant digits.

    >>> short(25_557_032), short(4_089_284_096, "B"), short(912, "B"), short(912)
    ('25.6 M', '4.09 GB', '912 B', '912')
    """
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:,} {unit}".rstrip()


ENVIRONMENT = Environment(
    loader=PackageLoader("fxprune.reporting.html", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "formatted": format, "short": short, "milliseconds": milliseconds, "plural": plural,
    "figure": figure,
}  # fmt: skip
ENVIRONMENT.globals |= {"drawing": drawing, "zip": zip}
