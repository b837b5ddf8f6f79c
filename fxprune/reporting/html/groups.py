"""The groups of a report's page: a table whose rows open to widths, ToD curve and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from fxprune.reporting.html.drawing import scatter, tod_curve
from fxprune.reporting.html.markup import Cell, Row, card, note, number, opening, share, table
from fxprune.reporting.records import GroupReport, Ranking, ReportRecord

COLUMNS = (
    ("#", "figure wide"), ("group", ""), ("units", "figure"), ("stay", "figure"), ("left", "figure"),
    ("layers", "figure wide"), ("removal", "wide"),
)  # fmt: skip
KEY = '<span class="key"><i class="stays"></i>stays<i class="gone"></i>went</span>'
NO_RANKING = (
    "No curve: the scores were not at hand (fxprune.apply(model, plan, scores=scores) gives them), "
    "or several rounds led here."
)


def groups_section(report: ReportRecord) -> str:
    """The card of all groups."""
    if not report.groups:
        return card("Groups", note("Nothing of this model can be pruned."))
    kept = sum(group.after for group in report.groups)
    said = f"{len(report.groups)} groups of units that leave together; {kept:,} of "
    said += f"{sum(group.before for group in report.groups):,} units stay. A row opens to its layers and its ranks."
    rows = (_row(index, group, report) for index, group in enumerate(report.groups))
    button = '<button type="button" class="all" hidden>open all</button>'
    return card("Groups", note(said) + table(COLUMNS, rows), beside=button)


def _row(index: int, group: GroupReport, report: ReportRecord) -> Row:
    key = f"group-{index}"
    exact = f'<span class="tag">{"inexact" if group.inexact else "exact"}</span>'
    cells = (
        number(index + 1, classes="wide"), opening(group.name, key), number(group.before), number(group.after),
        share(group.after, group.before), number(len(group.sites), classes="wide"),
        Cell(exact, "inexact" if group.inexact else "exact", "wide"),
    )  # fmt: skip
    return Row(cells, f'<div class="panels">{"".join(_panels(group, report))}</div>', key)


def _panels(group: GroupReport, report: ReportRecord) -> Iterator[str]:
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{number(before).markup()}{number(after).markup()}</tr>"
        for name, (before, after) in group.sites.items()
    )
    head = '<tr><th>layer</th><th class="figure">before</th><th class="figure">after</th></tr>'
    ranking = group.ranking if group.ranking and group.ranking.proposed else None
    notes = [f"inexact: {group.inexact}"] if group.inexact else []
    notes += [] if ranking else [NO_RANKING]
    yield f"<div><table><thead>{head}</thead><tbody>{rows}</tbody></table>{''.join(map(note, notes))}</div>"
    if ranking:
        signals = report.signals or ("what proposes", "what protects")
        yield _figure(tod_curve(group, ranking, report.alpha), escape(_about_curve(group, ranking, report)))
        yield _figure(scatter(group, ranking, signals), f"{escape(_about_ranks(group, ranking, signals))} {KEY}")


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _about_curve(group: GroupReport, ranking: Ranking, report: ReportRecord) -> str:
    gone = group.before - group.after
    said = "ToD(k): of the k units that are proposed first, the share that is protected as well."
    within = [tod for rank, tod in zip(ranking.proposed, ranking.tod, strict=False) if rank < gone]
    if within:
        said += f" ToD({gone:,}) is {within[-1]:.3g}."
    if not ranking.decides:
        said += f" The allocation was {ranking.allocate or 'a function of the caller'}, which does not look at it."
    elif report.budget:
        said += " Alpha is the level at which the budget is met; single units may have come back."
    return said


def _about_ranks(group: GroupReport, ranking: Ranking, signals: tuple[str, str]) -> str:
    where = "over the whole network, for what a unit saves" if ranking.allocate == "tod" else "in the group"
    said = f"Up: rank by {signals[1]} {where}. Shaded: proposed and protected alike, which is what ToD counts."
    shown = len(ranking.proposed)
    return said if shown == group.before else f"{said} {shown:,} of {group.before:,} units are shown."
