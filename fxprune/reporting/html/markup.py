"""Pieces of a report's page: tiles, cards, bars, and tables that can be sorted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its content, as HTML or as text that is escaped; the number that it is sorted by; its classes."""

    html: str
    value: float | str | None = None
    classes: str = ""

    def markup(self) -> str:
        """The cell as HTML."""
        value = "" if self.value is None else f' data-value="{escape(str(self.value))}"'
        return f"<td{_classes(self.classes)}{value}>{self.html}</td>"


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a table: its cells, and what is shown below them once it is opened, under an id of the page."""

    cells: tuple[Cell, ...]
    more: str = ""
    key: str = ""


def text(content: object, classes: str = "") -> Cell:
    """A cell of text."""
    return Cell(escape(str(content)), None, classes)


def number(value: float, shown: str | None = None, classes: str = "") -> Cell:
    """A cell of a number, which is sorted by its value."""
    return Cell(escape(f"{value:,}" if shown is None else shown), value, f"figure {classes}".strip())


def share(part: float, whole: float, classes: str = "") -> Cell:
    """A cell of a share, with a bar."""
    left = part / max(whole, 1e-12)
    return Cell(f'{bar(left)}<span class="percent">{left:.0%}</span>', left, f"figure {classes}".strip())


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Row]) -> str:
    """A table whose columns, (name, classes), sort it when they are clicked."""
    head = "".join(
        f'<th scope="col"{_classes(classes)}><button type="button">{escape(name)}</button></th>'
        for name, classes in columns
    )
    bodies = "".join(_body(row, len(columns)) for row in rows)
    return f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>{bodies}</table></div>'


def _body(row: Row, columns: int) -> str:
    cells = "".join(cell.markup() for cell in row.cells)
    more = f'<tr class="more" id="{row.key}"><td colspan="{columns}">{row.more}</td></tr>' if row.more else ""
    return f'<tbody><tr class="row">{cells}</tr>{more}</tbody>'


def opening(name: str, key: str) -> Cell:
    """The cell that opens what a row has below it."""
    button = f'<button type="button" class="toggle" aria-expanded="true" aria-controls="{key}">{escape(name)}</button>'
    return Cell(button, name, "name")


def card(title: str, content: str, *, beside: str = "") -> str:
    """A section of the page."""
    return f'<section class="card">{beside}<h2>{escape(title)}</h2>{content}</section>'


def note(content: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(content)}</p>'


def tile(name: str, shown: str, detail: str, left: float | None = None, *, hint: str = "") -> str:
    """A figure that matters, with the share that is left as a bar."""
    title = f' title="{escape(hint)}"' if hint else ""
    return (
        f'<div class="tile"{title}><div class="label">{escape(name)}</div><div class="number">{escape(shown)}</div>'
        f'<div class="detail">{escape(detail)}</div>{"" if left is None else bar(left)}</div>'
    )


def bar(left: float) -> str:
    """A bar that is filled to a share."""
    return f'<span class="bar"><i style="width:{100 * min(max(left, 0.0), 1.0):.1f}%"></i></span>'


def short(count: float) -> str:
    """A count with three digits that count.

    >>> short(25_557_032), short(4_089_284_096), short(912)
    ('25.6 M', '4.09 G', '912')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _classes(names: str) -> str:
    return f' class="{names}"' if names else ""
