"""The page that architectures.py writes: totals by library, what fails and why, and a row for each architecture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import DOCS, Table, environment, millions, percent, version

HEADING = "Models covered"
WHOLE = 0.97
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
Row = dict[str, Any]


def is_bad(row: Row) -> bool:
    """Whether an architecture could not be built, is not pruned and verified, or does not run as its own class."""
    return any(key in row for key in ("unbuilt", "failed", "own_failed")) or row.get("second", True) is not True


def line(row: Row) -> str:
    """One result for the terminal."""
    if "unbuilt" in row:
        return f"{row['model']}  not built: {row['unbuilt'][:150]}"
    if "failed" in row:
        return f"{row['model']}  {'FOREIGN ' * row.get('failed_foreign', False)}failed: {row['failed'][:300]}"
    own = f"own {row['own_after'] / row['before']:.0%}" if "own" in row else f"own: {row.get('own_failed', '')[:250]}"
    return (
        f"{row['model']}  {row['rung']}  {row['share']:.0%} in reach  {row['after'] / row['before']:.1%} left  "
        f"{row['error']:.0e}  {row['second']}  {own}  {row.get('no_rule', '')[:100]}"
    )


def library_of(row: Row) -> str:
    """The library of a row."""
    return str(row["model"]).partition("/")[0]


def is_own(row: Row) -> bool:
    """Whether an architecture runs as its own class, narrower where the graph is much narrower."""
    return bool(row.get("own")) and (row["own_after"] < WHOLE * row["before"] or share_left(row) > WHOLE)


def is_tried_as_own(row: Row) -> bool:
    """Whether it is known if an architecture runs as its own class."""
    return "own" in row or "own_failed" in row


def is_done(row: Row) -> bool:
    """Whether an architecture is pruned and verified."""
    return "failed" not in row and "unbuilt" not in row


def share_left(row: Row) -> float:
    """The parameters that are left, as a share."""
    return float(row["after"] / row["before"])


def totals(rows: Sequence[Row]) -> Table:
    """How many architectures of each library are pruned, verified, and run as their own class."""
    columns = (
        "library", "version", "tried", "pruned and verified", "at another batch size", "as its own class",
        "median parameters in reach", "median left", "over 97 % left",
    )  # fmt: skip
    libraries = list(dict.fromkeys(map(library_of, rows)))
    lines = [_total(name, [row for row in rows if library_of(row) == name]) for name in libraries]
    return Table("By library", columns, (*lines, _total("all", rows)))


def _total(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    rows = [row for row in rows if "unbuilt" not in row]
    done = [row for row in rows if is_done(row)]
    installed = "" if name == "all" else version(DISTRIBUTIONS.get(name, name))
    second = sum(row["second"] is True for row in done)
    own = f"{sum(map(is_own, done))} of {sum(map(is_tried_as_own, done))}"
    shares = [statistics.median(each(row) for row in done) if done else 0.0 for each in (_reach, share_left)]
    whole = sum(share_left(row) > WHOLE for row in done)
    return (name, installed, str(len(rows)), str(len(done)), str(second), own, *map(percent, shares), str(whole))


def _reach(row: Row) -> float:
    return float(row["share"])


def cells(row: Row) -> tuple[str, ...]:
    """One row of a library's table."""
    own = percent(row["own_after"] / row["before"]) if row.get("own") else "no" if is_tried_as_own(row) else ""
    return (
        row["model"].partition("/")[2], row["class"], row["rung"], millions(row["before"]), percent(row["share"]),
        percent(share_left(row)), f"{row['error']:.0e}", "yes" if row["second"] is True else "no", own,
    )  # fmt: skip


COLUMNS = (
    "model", "class", "captured by", "parameters", "in reach", "left", "error", "another batch size",
    "left in its class",
)  # fmt: skip
NOTE = (
    "Each architecture is small and has random weights; it is pruned at alpha 0.3 without compensation.\n\n"
    "- captured by: the way of capture.\n"
    "- in reach: the share of the parameters that are in tensors which a prunable group narrows.\n"
    "- left: the share of the parameters that is left.\n"
    "- error: that of `verify`, in float32.\n"
    "- another batch size: whether `verify` holds on a batch of another size.\n"
    "- left in its class: the same share with `own_class=True`, where what the class cannot run narrower is kept; "
    "empty where that was not tried."
)


def listing(title: str, note: str, rows: Sequence[Row], reason: Callable[[Row], str]) -> str:
    """A section that lists architectures with a reason each."""
    if not rows:
        return ""
    lines = [f"- {row['model']}: {' '.join(reason(row).split())}" for row in rows]
    return "\n".join([f"## {title}", "", note, "", *lines, ""])


def shortened(error: str) -> str:
    """An error without its remedies."""
    return error.partition("Keep the submodule")[0].strip()[:900]


def held(row: Row) -> str:
    """Why an architecture keeps nearly all of its parameters."""
    nothing = "no group has units that are proposed and not protected at this alpha"
    why = row.get("no_rule") or (row["held"][0][0] if row["held"] else nothing)
    return f"{percent(share_left(row))} left; {why}"


def why_not_own(row: Row) -> str:
    """Why an architecture does not run narrower as its own class."""
    if "own_failed" in row:
        return shortened(row["own_failed"])
    return f"all is kept; {row['own_held'][0][0]}"


def summary(rows: Sequence[Row]) -> str:
    """The totals in three sentences."""
    rows = [row for row in rows if "unbuilt" not in row]
    done = [row for row in rows if is_done(row)]
    foreign = sum(bool(row.get("failed_foreign")) for row in rows)
    tried, own = sum(map(is_tried_as_own, done)), sum(map(is_own, done))
    return (
        f"{len(done)} of {len(rows)} architectures are pruned and verified ({len(done) / max(len(rows), 1):.1%}). "
        f"{own} of the {tried} of them that were tried run narrower as their own class ({own / max(tried, 1):.1%}). "
        f"{foreign} end in an error that is not one of fxprune's."
    )


def write(results: Mapping[str, Row], folder: Path | None) -> None:
    """Write docs/coverage.md and docs/benchmarks/coverage.json, or both into another folder."""
    rows = [results[name] for name in sorted(results)]
    page, data = (DOCS.parent, DOCS) if folder is None else (folder, folder)
    data.mkdir(parents=True, exist_ok=True)
    done = [row for row in rows if is_done(row)]
    sections = [
        totals(rows).markdown(),
        listing("What fails", "With the error.", [r for r in rows if "failed" in r], lambda r: shortened(r["failed"])),
        listing(
            "What keeps over 97 % of its parameters", "With the reason for most of them.",
            [r for r in done if share_left(r) > WHOLE], held,
        ),
        listing(
            "What does not run as its own class", "The graph that `compress` gives without `own_class` works.",
            [r for r in done if is_tried_as_own(r) and not is_own(r)], why_not_own,
        ),
        listing(
            "What does not run at another batch size", "With the error.",
            [r for r in done if r["second"] is not True], lambda r: shortened(r["second"] or "the outputs differ"),
        ),
        *(_library(name, done) for name in dict.fromkeys(map(library_of, done))),
        listing(
            "Not tried", "No small configuration of these was made.", [r for r in rows if "unbuilt" in r],
            lambda r: r["unbuilt"][:160],
        ),
    ]  # fmt: skip
    head = [f"# {HEADING}", "", summary(rows), "", NOTE, "", environment(), ""]
    (page / "coverage.md").write_text("\n".join([*head, *filter(None, sections)]))
    (data / "coverage.json").write_text(json.dumps(rows, indent=1) + "\n")


def _library(name: str, rows: Sequence[Row]) -> str:
    return Table(name, COLUMNS, tuple(cells(row) for row in rows if library_of(row) == name)).markdown()
