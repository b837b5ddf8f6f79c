"""A report as one HTML page that loads nothing: no network, no other file."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.errors import visible
from fxprune.planning.plan import BUDGETS
from fxprune.reporting.html import drawing
from fxprune.reporting.records import ReportRecord, milliseconds, plural
from fxprune.reporting.tables import level_of


def page(report: ReportRecord) -> str:
    """The page as text."""
    template = ENVIRONMENT.get_template("page.html")
    return visible(
        template.render(report=report, title=_title(report), style=_text("page.css"), script=_text("page.js"))
    )


def _title(report: ReportRecord) -> str:
    """How the model was pruned."""
    if report.budget:
        return f"pruned to {report.budget.achieved:.1%} of the {BUDGETS[report.budget.of]}"
    return f"pruned at {level_of(report)}" if report.alpha is not None else "pruned by a plan"


def _text(name: str) -> str:
    """A file of this package."""
    return (files("fxprune.reporting.html") / name).read_text(encoding="utf-8")


def short(count: float) -> str:
    """A count with three significant digits.

    >>> short(25_557_032), short(4_089_284_096), short(912)
    ('25.6 M', '4.09 G', '912')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


ENVIRONMENT = Environment(
    loader=PackageLoader("fxprune.reporting.html", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"formatted": format, "short": short, "milliseconds": milliseconds, "plural": plural}
ENVIRONMENT.globals |= {"drawing": drawing, "zip": zip}
