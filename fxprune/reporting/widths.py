"""The widths of a report's layers, and which of them are slow."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.coupling.branch_units import SITE
from fxprune.reporting.records import ReportRecord

BLOCK = 8  # channels; kernels work in multiples


@dataclass(frozen=True, slots=True)
class LayerWidth:
    """The channels of one layer before and after; `prunable` says whether any of them could be removed.

    >>> LayerWidth("conv1", 64, 37, prunable=True).odd
    True
    """

    name: str
    before: int
    after: int
    prunable: bool

    @property
    def share(self) -> float:
        """The share of the channels that is kept."""
        return self.after / max(self.before, 1)

    @property
    def odd(self) -> bool:
        """Whether the layer was narrowed to a width that is no multiple of `BLOCK`."""
        return self.after < self.before and self.after % BLOCK > 0


def layer_widths(report: ReportRecord) -> list[LayerWidth]:
    """The widths of all layers, front to back; in a report of an older version those of the groups, by group."""
    prunable = {name: pair for group in report.groups for name, pair in group.sites.items()}
    found = (report.widths or prunable).items()
    return [LayerWidth(name, *pair, name in prunable) for name, pair in found if not name.startswith(SITE)]


def odd_widths(widths: list[LayerWidth]) -> str:
    """Which of these layers were narrowed to an odd width; empty where none was.

    >>> odd_widths([LayerWidth("a", 16, 5, True), LayerWidth("b", 16, 8, True)])
    '1 of 2 narrowed layers has a width that is no multiple of 8 (a: 5)'
    """
    narrowed = [width for width in widths if width.after < width.before]
    odd = [f"{width.name}: {width.after}" for width in narrowed if width.odd]
    if not odd:
        return ""
    named = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
    verb = "has" if len(odd) == 1 else "have"
    return f"{len(odd)} of {len(narrowed)} narrowed layers {verb} a width that is no multiple of {BLOCK} ({named})"
