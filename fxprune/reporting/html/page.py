"""A report as one HTML page that loads nothing: no network, no other file."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fxprune.errors import plural, visible
from fxprune.planning.plan import BUDGETS
from fxprune.reporting.html import drawing
from fxprune.reporting.records import ReportRecord, milliseconds
from fxprune.reporting.tables import level_of
from fxprune.reporting.widths import layer_widths, odd_widths


def page(report: ReportRecord) -> str:
    """The page as text."""
    widths = layer_widths(report)
    return visible(
        ENVIRONMENT.get_template("page.html").render(
            report=report, title=_title(report), stem=_stem(report), widths=widths, odd=odd_widths(widths),
            style=_text("page.css"), script=_text("page.js"),
        )  # fmt: skip
    )


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


def breakable(text: str) -> Markup:
    """Text that may break after a dot or an underscore.

    >>> breakable("layer1.0.<conv>")
    Markup('layer1.<wbr>0.<wbr>&lt;conv&gt;')
    """
    return Markup(re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(text)))


def figure(value: float, name: str) -> str:
    """A figure of quality: accuracy in percent, any other with four significant digits.

    >>> figure(0.8125, "accuracy"), figure(0.8125, "loss")
    ('81.2%', '0.8125')
    """
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"


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
ENVIRONMENT.filters |= {
    "formatted": format, "short": short, "milliseconds": milliseconds, "plural": plural,
    "figure": figure, "breakable": breakable,
}  # fmt: skip
ENVIRONMENT.globals |= {"drawing": drawing, "zip": zip}
