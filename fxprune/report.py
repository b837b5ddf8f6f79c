"""What was asked, what was achieved, and what was left whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from fxprune.capture import ModelGraph
from fxprune.compensation import Compensation
from fxprune.coupling import Coupling
from fxprune.errors import FxpruneError
from fxprune.plan import Budget


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group: its number of units before and after, and the width of each of its sites before and after.

    `inexact` says which statistic changes with the removal, or is None where the removal is exact.
    """

    name: str
    before: int
    after: int
    sites: Mapping[str, tuple[int, int]]
    inexact: str | None = None


@dataclass(frozen=True, slots=True)
class FrozenReport:
    """Layers whose channels stayed whole, and why."""

    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What `finetune` did.

    `epochs` were asked for; `train_losses` has one entry for each that ran. `val_losses` and `metrics` (empty where no
    metric was given) begin with the model as it was given, and go on with one entry an epoch. `best` is the epoch whose
    weights were kept, 0 being the model as given.
    """

    epochs: int
    precision: str
    train_losses: tuple[float, ...] = ()
    val_losses: tuple[float, ...] = ()
    metrics: tuple[float, ...] = ()
    best: int = 0

    @property
    def ran(self) -> int:
        """The number of epochs that ran."""
        return len(self.train_losses)


@dataclass(frozen=True, slots=True)
class Report:
    """What `compress` or `apply` did.

    `captured` is the way by which the model became a graph: "fx", "values" or "export". `error` is verify's figure, or
    None where verify did not run. `whole` are the parameters of the whole model before and after, where only a part of
    it was pruned: then everything else is about that part. `finetuned` says what `finetune` did since; `error` is of
    the model before that. `budget` is what was asked for in place of alpha. `compensation` says what was done about the
    units that went; `error` is of the plain removal.
    """

    model: str
    alpha: float | None
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    error: float | None
    groups: tuple[GroupReport, ...]
    frozen: tuple[FrozenReport, ...]
    whole: tuple[int, int] | None = None
    captured: str = "fx"
    finetuned: Finetuning | None = None
    budget: Budget | None = None
    compensation: Compensation | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield self._summary()
        yield from [] if self.budget is None else [str(self.budget)]
        yield self._widths()
        for frozen in self.frozen:
            names = ", ".join(frozen.sites[:6]) + (", ..." if len(frozen.sites) > 6 else "")
            yield f"whole: {names}: {frozen.reason}"

    def _summary(self) -> Table:
        level = "a plan" if self.alpha is None else f"alpha {self.alpha:g}"
        table = Table(title=f"{self.model} at {level}")
        for name in ("", "before", "after", "left"):
            table.add_column(name, justify="left" if not name else "right")
        for name, before, after in (
            ("parameters", self.params_before, self.params_after),
            ("MACs a sample", self.macs_before, self.macs_after),
            *([("parameters of the whole", *self.whole)] if self.whole else []),
        ):
            table.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
        proof = "not run" if self.error is None else f"{self.error:.1e}"
        table.add_row("verify's error" + (", before fine-tuning" if self.finetuned else ""), "", proof, "")
        table.add_row("captured by", "", self.captured, "")
        if self.compensation:
            table.add_row(*_compensated(self.compensation))
        if self.finetuned:
            table.add_row(*_tuned(self.finetuned))
        return table

    def _widths(self) -> Table:
        table = Table("group", "units", "layers (channels before -> after)")
        for group in self.groups:
            sites = ", ".join(f"{name} {before}->{after}" for name, (before, after) in group.sites.items())
            table.add_row(group.name, f"{group.before} -> {group.after}", sites)
            if group.inexact:
                table.add_row("", "", f"inexact: {group.inexact}")
        return table


def _compensated(done: Compensation) -> tuple[str, str, str, str]:
    """The line of the summary on compensation: the output's error without it and with it, and what was changed."""
    name = f"output's error, compensation: {done.level}"
    layers = f"{sum(layer.strength is not None for layer in done.layers) + len(done.filled)} layers"
    if done.before is None or done.after is None:
        return name, "", "not measured", layers
    return name, f"{done.before:.1%}", f"{done.after:.1%}", layers


def _tuned(done: Finetuning) -> tuple[str, str, str, str]:
    """The line of the summary on fine-tuning: the metric, or the validation loss, and the epoch that was kept."""
    name, values = ("metric", done.metrics) if done.metrics else ("validation loss", done.val_losses)
    return f"fine-tuning: {name}", f"{values[0]:.4g}", f"{values[done.best]:.4g}", f"epoch {done.best} of {done.ran}"


def report(small: nn.Module) -> Report:
    """The report of a model that `compress` or `apply` made.

    Where parts of it were pruned, the first one's report: give another part, such as `small.backbone`, for its own.

    Raises FxpruneError where `small` is not such a model.
    """
    for _, found in _reported(small):
        return found
    raise FxpruneError(f"{type(small).__name__} has no report: it did not come from fxprune.compress or fxprune.apply")


def note_finetuning(small: nn.Module, done: Finetuning) -> None:
    """Add what fine-tuning did to the reports of a model, one for each part that was pruned."""
    for module, found in _reported(small):
        module.meta["fxprune"] = module.meta["fxprune"] | {"report": replace(found, finetuned=done)}


def _reported(small: nn.Module) -> Iterator[tuple[ModelGraph, Report]]:
    """The graphs in a model that have a report, and these."""
    for module in small.modules():
        found = module.meta.get("fxprune", {}).get("report") if isinstance(module, ModelGraph) else None
        if isinstance(module, ModelGraph) and isinstance(found, Report):
            yield module, found


def group_reports(coupling: Coupling, keep: NDArray[np.bool_], excluded: Iterable[str]) -> tuple[GroupReport, ...]:
    """The widths of every prunable group, before and after; groups of excluded sites are left out."""
    padded, out = np.append(keep, True), set(excluded)
    return tuple(
        GroupReport(
            group.name,
            len(group),
            int(keep[group.units.start : group.units.stop].sum()),
            {site.name: (site.width, int(padded[_free(site.units, len(keep))].sum())) for site in group.sites},
            group.inexact,
        )
        for group in coupling.prunable
        if not out.issuperset(site.name for site in group.sites)
    )


def frozen_reports(frozen: Mapping[str, tuple[str, ...]]) -> tuple[FrozenReport, ...]:
    """The layers with channels that stay whole, by reason."""
    return tuple(FrozenReport(sites, reason) for reason, sites in frozen.items())


def _free(units: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Unit numbers, with -1 for those of frozen units."""
    return np.where(units < count, units, -1)
