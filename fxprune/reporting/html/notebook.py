"""A report in a notebook: its summary as a small table, in the notebook's own colours."""

from __future__ import annotations

from fxprune.errors import visible
from fxprune.reporting.html.page import ENVIRONMENT
from fxprune.reporting.records import ReportRecord
from fxprune.reporting.tables import level_of, summary


def summary_table(report: ReportRecord) -> str:
    """The markup of the table."""
    template = ENVIRONMENT.get_template("notebook.html")
    return visible(template.render(report=report, level=level_of(report), rows=list(summary(report))))
