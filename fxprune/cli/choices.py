"""The options on what may go, how much, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.targets import object_of
from fxprune.errors import PlanError
from fxprune.planning.allocation import ALLOCATIONS
from fxprune.planning.budgets import given
from fxprune.recovery.compensate import LEVELS
from fxprune.scoring.signals.table import SIGNALS

_SIGNALS = ", ".join(SIGNALS)
_Coupling = partial(typer.Option, rich_help_panel="What may go")
_Scoring = partial(typer.Option, rich_help_panel="Scoring")
_Level = partial(typer.Option, rich_help_panel="How much goes (one of these)")
_Limits = partial(typer.Option, rich_help_panel="Bounds")


def one_of(known: Iterable[str]) -> Callable[[str | None], str | None]:
    """A check that a value is one of those known."""
    names = tuple(known)

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(names)}")
        return value

    return check


Run = Annotated[
    str | None,
    _Scoring(
        metavar="MODULE:FUNCTION",
        help="Function (model, inputs, targets) -> mean loss, for models that give their loss themselves.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingOptions:
    """Which channels may go."""

    exclude: Annotated[
        list[str],
        _Coupling(metavar="PATTERN", help="Layers that stay whole: names, or patterns such as 'layer4.*'. Repeatable."),
    ] = field(default_factory=list)
    inexact: Annotated[
        bool, _Coupling("--inexact", help="Also prune channels over which a statistic such as LayerNorm is taken.")
    ] = False
    head_dim: Annotated[
        bool, _Coupling("--head-dim", help="Of attention, prune places within heads in place of whole heads.")
    ] = False
    unknown: Annotated[
        str,
        _Coupling(
            callback=one_of(("error", "freeze")),
            help="What an operation without a rule does: error, or freeze (its channels stay whole).",
        ),
    ] = "error"

    def coupling(self) -> dict[str, Any]:
        """The options as arguments of `couple`."""
        return {
            "exclude": tuple(self.exclude), "unknown": self.unknown, "inexact": self.inexact, "head_dim": self.head_dim
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions(CouplingOptions):
    """What units are ranked by, and which of them may go."""

    propose: Annotated[
        str,
        _Scoring(callback=one_of(SIGNALS), help=f"Signal by which units leave, lowest first: {_SIGNALS}."),
    ] = "reconstruction"
    protect: Annotated[
        str, _Scoring(callback=one_of(SIGNALS), help="Signal by which units are protected, highest first.")
    ] = "taylor-by-sample"
    loss: Annotated[
        str | None,
        _Scoring(metavar="MODULE:FUNCTION", help="Function (output, targets) -> mean loss; cross-entropy by default."),
    ] = None
    run: Run = None
    classes: Annotated[
        str | None,
        _Scoring(
            metavar="MODULE:FUNCTION",
            help="Function from targets to class numbers, for --propose separability where targets are none.",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        _Scoring(dir_okay=False, help="Keep what was found in this file, and go on from it after an interruption."),
    ] = None
    every: Annotated[int, _Scoring(min=1, help="Write --checkpoint after so many batches.")] = 50

    def arguments(self) -> dict[str, Any]:
        """All options, as arguments of `score` and `compress`."""
        named = {"loss": self.loss, "run": self.run, "classes": self.classes}
        functions = {name: object_of(target, f"--{name}") for name, target in named.items() if target}
        file = {"checkpoint": self.checkpoint, "every": self.every}
        return {"propose": self.propose, "protect": self.protect, **file, **self.coupling(), **functions}


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelOptions:
    """How much goes."""

    alpha: Annotated[
        float | None,
        _Level(min=0, max=1, help="Tolerance of difference, 0 (least) to 1 (most); 0.05 where no budget is given."),
    ] = None
    params: Annotated[float | None, _Level(min=0, max=1, help="Share of the parameters to keep, such as 0.5.")] = None
    macs: Annotated[float | None, _Level(min=0, max=1, help="Share of the multiply-accumulates to keep.")] = None
    latency: Annotated[
        float | None, _Level(min=0, max=1, help="Share of the time to keep, estimated from the times of the layers.")
    ] = None

    def asked(self) -> dict[str, Any]:
        """The one that was given, as arguments of `Scores.plan` and `compress`."""
        asked = {"alpha": self.alpha, "params": self.params, "macs": self.macs, "latency": self.latency}
        try:
            given(**asked)
        except PlanError as error:
            raise typer.BadParameter(str(error), param_hint="--alpha / --params / --macs / --latency") from None
        return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """What holds at every level; None where scores were told already."""

    round_to: Annotated[
        int | None, _Limits(min=1, help="Keep a multiple of so many units in each group, such as 8; 1 by default.")
    ] = None
    min_keep: Annotated[int | None, _Limits(min=1, help="Keep at least so many units of each group; 1 by default.")] = (
        None
    )

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        limits = {"round_to": self.round_to, "min_keep": self.min_keep}
        return {name: value for name, value in limits.items() if value is not None}


Allocation = Annotated[
    str,
    _Limits(callback=one_of(ALLOCATIONS), help=f"How a level becomes widths: {', '.join(ALLOCATIONS)}."),
]
Level = partial(typer.Option, callback=one_of(LEVELS), metavar="|".join(LEVELS))
