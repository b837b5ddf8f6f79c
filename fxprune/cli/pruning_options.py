"""The options on the channels to remove, their number, and compensation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.caller.arguments import check_value
from fxprune.cli.named_objects import did_you_mean, object_of
from fxprune.cli.option_names import as_options
from fxprune.coupling.kinds import KINDS
from fxprune.errors import PlanError
from fxprune.planning.allocation import ALLOCATIONS, BESIDE, MEASURED, ONLY
from fxprune.planning.budgets import given
from fxprune.recovery.compensate import LEVELS
from fxprune.scoring.signals.table import SIGNALS

_Coupling = partial(typer.Option, rich_help_panel="What may be removed")
_Scoring = partial(typer.Option, rich_help_panel="Scoring")
_Function = partial(_Scoring, metavar="MODULE:FUNCTION")
_Bound = partial(typer.Option, rich_help_panel="Bounds")


def _share(value: float | None) -> float | None:
    """A number from 0 to 1, or None."""
    if value is None or 0 <= value <= 1:
        return value
    remedy = f"; write {value / 100:g} for {value:g}%" if 1 < value <= 100 else ""
    raise typer.BadParameter(f"{value:g} is not from 0 to 1{remedy}")


_HOW_MUCH = "How much is removed (one of these)"
_Share = partial(typer.Option, rich_help_panel=_HOW_MUCH, metavar="0..1", callback=_share)


def one_of(known: Iterable[str]) -> Callable[[str | None], str | None]:
    """A check that a value is one of those known."""
    names = tuple(known)

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(names)}{did_you_mean(value, names)}")
        return value

    return check


Run = Annotated[
    str | None, _Function(help="Function (model, inputs, targets) -> mean loss, for models that compute it themselves.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingOptions:
    """Which channels may be removed."""

    exclude: Annotated[
        list[str],
        _Coupling(metavar="PATTERN", help="Layers to keep whole: names, or patterns such as 'layer4.*'. Repeatable."),
    ] = field(default_factory=list)
    inexact: Annotated[
        bool, _Coupling("--inexact", help="Also prune channels over which a statistic such as LayerNorm is taken.")
    ] = False
    head_dim: Annotated[bool, _Coupling("--head-dim", help="Prune within attention heads, not whole heads.")] = False
    query_heads: Annotated[
        bool,
        _Coupling("--query-heads", help="Where heads of queries share keys, prune single heads, not whole groups."),
    ] = False
    unknown: Annotated[
        str,
        _Coupling(
            callback=one_of(("error", "freeze")),
            help="For an operation without a rule: error, or freeze, which keeps its channels whole.",
        ),
    ] = "error"

    def coupling(self) -> dict[str, Any]:
        """The options as arguments of `couple`."""
        return {
            "exclude": tuple(self.exclude), "unknown": self.unknown, "inexact": self.inexact, "head_dim": self.head_dim,
            "query_heads": self.query_heads,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions(CouplingOptions):
    """The scores of units, and which units may be removed."""

    propose: Annotated[
        str,
        _Scoring(callback=one_of(SIGNALS), help=f"Signal that proposes units, lowest first: {', '.join(SIGNALS)}."),
    ] = "reconstruction"
    protect: Annotated[str, _Scoring(callback=one_of(SIGNALS), help="Signal that protects units, highest first.")] = (
        "taylor-by-sample"
    )
    loss: Annotated[
        str | None, _Function(help="Function (output, targets) -> mean loss; cross-entropy by default.")
    ] = None
    run: Run = None
    classes: Annotated[
        str | None, _Function(help="Function from targets to class numbers, for separability where they are none.")
    ] = None
    checkpoint: Annotated[
        Path | None, _Scoring(dir_okay=False, help="File for the state of the pass, to resume after an interruption.")
    ] = None
    every: Annotated[int, _Scoring(min=1, help="Write --checkpoint after so many batches.")] = 50

    def arguments(self) -> dict[str, Any]:
        """All options, as arguments of `score` and `compress`."""
        named = {"loss": self.loss, "run": self.run, "classes": self.classes}
        functions = {name: object_of(target, f"--{name}") for name, target in named.items() if target}
        plain = {"propose": self.propose, "protect": self.protect, "checkpoint": self.checkpoint, "every": self.every}
        return {**plain, **self.coupling(), **functions}


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelOptions:
    """How much is removed."""

    alpha: Annotated[
        float | None,
        _Share(help="Tolerance of difference, 0 (least) to 1 (most); 0.05 where no budget or ratio is given."),
    ] = None
    params: Annotated[float | None, _Share(help="Share of the parameters to keep, such as 0.5.")] = None
    macs: Annotated[float | None, _Share(help="Share of the multiply-accumulates to keep.")] = None
    latency: Annotated[float | None, _Share(help="Share of the time to keep, by the times of the layers.")] = None
    ratio: Annotated[
        list[str],
        _Bound(
            metavar="LAYER=SHARE",
            help="Share of a layer's units to remove, such as layer1.0.conv1=0.5 or 'layer2.*=0.25'; alone, no other "
            "layer is pruned. Repeatable.",
        ),
    ] = field(default_factory=list)

    def asked(self) -> dict[str, Any]:
        """The options as arguments of `Scores.plan` and `compress`; at most one level or budget is given."""
        asked = asdict(self)
        ratios = dict(_ratio(text) for text in asked.pop("ratio"))
        try:
            given(**asked)
        except PlanError as error:
            raise typer.BadParameter(
                as_options(str(error)), param_hint="--alpha / --params / --macs / --latency"
            ) from None
        return asked | ({"ratios": ratios} if ratios else {})


def _ratio(text: str) -> tuple[str, float]:
    """A layer and its ratio.

    >>> _ratio("layer2.*=0.25")
    ('layer2.*', 0.25)
    """
    layer, _, share = text.rpartition("=")
    try:
        check_value("ratios", found := {layer: float(share)})
    except (ValueError, PlanError):
        raise typer.BadParameter(
            f"{text!r} is no LAYER=SHARE such as layer1.0.conv1=0.5, with a share of at least 0 and less than 1",
            param_hint="--ratio",
        ) from None
    return next(iter(found.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """The limits at every level; None leaves a limit to the scores."""

    round_to: Annotated[
        str | None,
        _Bound(
            metavar="N|KIND=N,...",
            help="Keep a multiple of so many units per group; 1 by default. By the kind of units: heads=1,hidden=128; "
            f"the kinds are {', '.join(KINDS)}.",
        ),
    ] = None
    equal_blocks: Annotated[
        bool | None,
        _Bound(help="Let blocks that repeat keep equal numbers of units of each kind.", show_default=False),
    ] = None
    min_keep: Annotated[int | None, _Bound(min=1, help="Keep at least so many units per group; 1 by default.")] = None
    blocks: Annotated[
        str | None,
        _Bound(
            callback=one_of((BESIDE, ONLY)),
            metavar=f"{BESIDE}|{ONLY}",
            help="Within a budget, also remove whole residual branches: beside units of layers, or only these.",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The limits that were given."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        found |= {"round_to": _multiples(self.round_to)} if self.round_to is not None else {}
        return found | ({"blocks": self.blocks == BESIDE or ONLY} if self.blocks is not None else {})


def _multiples(text: str) -> int | dict[str, int]:
    """One multiple, or one for each kind of units.

    >>> _multiples("8"), _multiples("heads=1,hidden=128")
    (8, {'heads': 1, 'hidden': 128})
    """
    try:
        found = (
            int(text) if "=" not in text else {k.strip(): int(n) for k, n in (p.split("=") for p in text.split(","))}
        )
        check_value("round_to", found)
    except (ValueError, PlanError) as error:
        why = f": {as_options(str(error).removeprefix('round_to: '))}" if isinstance(error, PlanError) else ""
        raise typer.BadParameter(
            f"{text!r} is no multiple such as 8, or heads=1,hidden=128{why}", param_hint="--round-to"
        ) from None
    return found


Allocation = Annotated[
    str, _Bound(callback=one_of(ALLOCATIONS), help=f"How a level becomes widths: {', '.join(ALLOCATIONS)}.")
]
Chosen = Annotated[
    str | None,
    _Bound(
        callback=one_of((*ALLOCATIONS, MEASURED)),
        help=f"How a level becomes widths: {', '.join((*ALLOCATIONS, MEASURED))}; by default, several are compared "
        "under a budget, and tod goes by alpha.",
    ),
]
Level = partial(typer.Option, callback=one_of(LEVELS), metavar="|".join(LEVELS))
NewBiases = Annotated[
    bool, typer.Option("--new-biases/--no-new-biases", help="Whether compensation may give a bias to a layer.")
]
