"""The drawings of a report's page: SVG as text, coloured by the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxprune.reporting.records import BatchLatency, GroupReport, Ranking, Timing, milliseconds

WIDTH, HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 308, 14, 186  # of the area inside the axes
BAR = 12  # height of a bar of time


def tod_curve(group: GroupReport, ranking: Ranking, alpha: float | None) -> str:
    """The tolerance of difference of a group over the number of units that go, with alpha and the depth marked."""
    n, gone = max(group.before, 1), group.before - group.after
    level = alpha if ranking.decides else None
    top = _rounded_up(max(*ranking.tod, level or 0, 0.05))
    points = [(_x((rank + 1) / n), _y(tod / top)) for rank, tod in zip(ranking.proposed, ranking.tod, strict=False)]
    parts = [_grid(_counts(n), _levels(top), "units that go", "ToD")]
    if level is not None:
        parts += [_line("alpha", LEFT, _y(level / top), RIGHT, _y(level / top))]
        side, x = ("start", LEFT + 4) if gone > n / 2 else ("end", RIGHT - 2)
        parts += [_text(f"alpha {side}", x, _y(level / top) - 4, f"alpha {level:.3g}")]
    if gone:
        parts += [_line("depth", _x(gone / n), TOP, _x(gone / n), BOTTOM)]
        side, shift = ("start", 4) if gone < 0.6 * n else ("end", -4)
        parts += [_text(f"depth {side}", _x(gone / n) + shift, TOP + 9, f"{gone:,} went")]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    return _svg(f"Tolerance of difference of {group.name} over the units that go", parts)


def scatter(group: GroupReport, ranking: Ranking, signals: tuple[str, str]) -> str:
    """Every unit of a group by its two ranks; those in the shaded corner are proposed and protected alike."""
    n, among = max(group.before, 1), max(ranking.among, 1)
    depth = (group.before - group.after) / n
    x, y = _x(depth), _y(1 - depth)
    parts = (
        [f'<rect class="both" x="{LEFT}" y="{TOP}" width="{x - LEFT:.1f}" height="{y - TOP:.1f}"/>'] if depth else []
    )
    parts += [_grid(_counts(n), [(0.0, "least"), (1.0, "most")], f"rank by {signals[0]}", signals[1])]
    size = "large" if len(ranking.proposed) <= 64 else "small"
    for name, wanted in (("stays", True), ("gone", False)):
        units = zip(ranking.proposed, ranking.protected, ranking.stays, strict=False)
        dots = "".join(f"M{_x((u + 0.5) / n):.1f} {_y((r + 0.5) / among):.1f}h0" for u, r, s in units if s is wanted)
        parts += [f'<path class="dots {name} {size}" d="{dots}"/>'] if dots else []
    return _svg(f"Units of {group.name} by rank of {signals[0]} and of {signals[1]}", parts)


def times(pair: BatchLatency) -> str:
    """Two bars of median times, each with its quartiles."""
    longest = max(pair.before.high, pair.after.high, 1e-12)
    height = 2 * BAR + 10
    bars = [_time("before", 2, pair.before, longest), _time("after", BAR + 8, pair.after, longest)]
    said = f"{milliseconds(pair.before.median)} before and {milliseconds(pair.after.median)} after"
    return (
        f'<svg class="times" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(said)}">'
        f"<title>{escape(said)}</title>{''.join(bars)}</svg>"
    )


def _time(name: str, y: float, timing: Timing, longest: float) -> str:
    low, middle, high = ((WIDTH - 4) * value / longest for value in (timing.low, timing.median, timing.high))
    center = y + BAR / 2
    return (
        f'<rect class="{name}" x="0" y="{y}" width="{middle:.1f}" height="{BAR}" rx="2"/>'
        f'<path class="spread" d="M{low:.1f} {center}H{high:.1f}M{low:.1f} {y + 2}v{BAR - 4}'
        f'M{high:.1f} {y + 2}v{BAR - 4}"/>'
    )


def _svg(said: str, parts: Iterable[str]) -> str:
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">'
    return f"{head}{''.join(parts)}</svg>"


def _grid(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]], name: str, side: str) -> str:
    """Axes with ticks at shares of their lengths, and their names."""
    lines = [_line("grid", LEFT, _y(share), RIGHT, _y(share)) for share, _ in up]
    lines += [_line("grid", _x(share), TOP, _x(share), BOTTOM) for share, _ in across]
    lines += [_text("tick end", LEFT - 6, _y(share) + 3.5, label) for share, label in up]
    lines += [_text("tick middle", _x(share), BOTTOM + 14, label) for share, label in across]
    lines.append(_text("name middle", (LEFT + RIGHT) / 2, HEIGHT - 10, name))
    middle = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    return "".join(lines) + f'<text class="name middle" x="12" y="{middle}" {turned}>{escape(side)}</text>'


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(name: str, x: float, y: float, content: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def _counts(n: int) -> list[tuple[float, str]]:
    """Ticks at quarters of a number of units."""
    marks = sorted({0, n // 4, n // 2, 3 * n // 4, n})
    return [(mark / n, f"{mark:,}") for mark in marks]


def _levels(top: float) -> list[tuple[float, str]]:
    return [(quarter / 4, f"{top * quarter / 4:.3g}") for quarter in (0, 2, 4)]


def _rounded_up(value: float) -> float:
    """The least of a few round numbers that is not below a share.

    >>> _rounded_up(0.07), _rounded_up(0.9)
    (0.1, 1.0)
    """
    return next((top for top in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8) if value <= top), 1.0)


def _x(share: float) -> float:
    return LEFT + share * (RIGHT - LEFT)


def _y(share: float) -> float:
    return BOTTOM - min(share, 1.0) * (BOTTOM - TOP)
