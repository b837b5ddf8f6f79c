"""The parts of a report: frozen dataclasses that can be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxprune.errors import plural
from fxprune.planning.plan import Budget
from fxprune.reporting.provenance import Provenance
from fxprune.reporting.timings import MeasuredLatency

SMALL = 1e-3  # a share below which percent would show nothing
SAMPLED = 512  # units of a group that a report holds at most
FEW = 32  # calibration samples, below which a report says so


@dataclass(frozen=True, slots=True)
class Ranking:
    """The two orders of a group's units, and the tolerance of difference that follows from them.

    Each field has one entry per unit, in the order in which units are proposed for removal; a group of more than
    `SAMPLED` units is sampled at even distances of that order. `proposed` is the unit's rank by the proposing signal, 0
    for the first to be removed. `protected` is its rank by the protecting signal, 0 for the lowest, among `among`
    units: those of the group, or of the whole network where `allocate` is "tod". `stays` says whether the unit is
    kept, and `tod` is the tolerance of difference at depth `proposed` + 1. `allocate` names the allocation; None is a
    function of the caller's.
    """

    proposed: tuple[int, ...]
    protected: tuple[int, ...]
    stays: tuple[bool, ...]
    tod: tuple[float, ...]
    among: int
    allocate: str | None = None

    @property
    def decides(self) -> bool:
        """Whether this curve decided the widths."""
        return self.allocate in ("tod", "tod-by-group")


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group: its number of units before and after, and the width of each of its sites before and after.

    `inexact` says which statistic changes with the removal, or is None where the removal is exact. `ranking` is None
    where the scores were not at hand.
    """

    name: str
    before: int
    after: int
    sites: Mapping[str, tuple[int, int]]
    inexact: str | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True, slots=True)
class FrozenReport:
    """Layers that lost no channels, and why."""

    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RouterReport:
    """A layer that routes tokens to experts.

    `experts` is their number before, `kept` the numbers of those that are kept, `chosen` how many each token uses.
    `usage` says how much each expert of the original is used on the calibration data: its weight times the norm of its
    output, as a mean over all tokens (zero for tokens of other experts), divided by the sum over the experts. It is
    None where the scores were not at hand, or measure nothing of the kind.
    """

    router: str
    experts: int
    kept: tuple[int, ...]
    chosen: int
    usage: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer: its type, and its parameters and multiply-accumulates a sample, both before and after.

    `name` is the path of a module, or of the module that holds a function's weight, or else a node of the graph.
    """

    name: str
    kind: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finetuning:
    """The course of `finetune`.

    `epochs` is the number asked for; `train_losses` has one entry for each that ran. `val_losses` and `metrics` (empty
    where no metric was given) hold the value of the given model, followed by one for each epoch. `best` is the epoch
    whose weights were kept, 0 being the given model.
    """

    epochs: int
    precision: str
    train_losses: tuple[float, ...] = ()
    val_losses: tuple[float, ...] = ()
    metrics: tuple[float, ...] = ()
    best: int = 0

    def __post_init__(self) -> None:
        judged = self.metrics or self.val_losses
        if (self.train_losses or judged) and not 0 <= self.best < len(judged):
            raise ValueError(f"epoch {self.best} of a fine-tuning was kept, but {len(judged)} were judged")

    def __repr__(self) -> str:
        name, values = self.judged_by
        course = f": {name} {values[0]:.4g} -> {values[self.best]:.4g} at epoch {self.best}" if values else ""
        return f"fine-tuning in {self.precision}, {self.ran} of {plural(self.epochs, 'epoch')}{course}"

    @property
    def judged_by(self) -> tuple[str, tuple[float, ...]]:
        """The name and the values of the figure that chose the epoch: the metric, or else the validation loss."""
        return ("metric", self.metrics) if self.metrics else ("validation loss", self.val_losses)

    @property
    def ran(self) -> int:
        """The number of epochs that ran."""
        return len(self.train_losses)


@dataclass(frozen=True, slots=True)
class Compensation:
    """How the removal was compensated for.

    `before` and `after` say how far the outputs are from the original's, by the `measure`, after plain removal and
    after compensation: on calibration samples that played no part in any fit or choice. They are None where too few
    samples could be set apart. `chosen` are the same two on the samples that chose which steps to keep. `compared` are
    the ways of planning that were tried, each with the error of its model on those samples, before anything was fitted
    to them. `layers` are those that were refitted, `filled` the nodes into whose weights the removed units were folded,
    and `norms` the number of BatchNorms whose statistics were recomputed.
    """

    level: str
    before: float | None = None
    after: float | None = None
    layers: tuple[Refit, ...] = ()
    filled: tuple[str, ...] = ()
    norms: int = 0
    measure: str = "squared error, in shares of the variance"
    chosen: tuple[float, float] | None = None
    compared: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        known = self.before is not None and self.after is not None
        errors = f"{self.shown(self.before)} -> {self.shown(self.after)}" if known else "not measured"
        return f"compensation {self.level}: output's error {errors}, {plural(self.refitted, 'layer')} refitted"

    @property
    def is_share(self) -> bool:
        """Whether errors are shares, to be shown in percent."""
        return "shares" in self.measure

    def shown(self, error: float | None) -> str:
        """An error by the measure, as text: in percent where it is a share."""
        if error is None:
            return ""
        return f"{error:.1%}" if self.is_share and not 0 < error < SMALL else f"{error:.3g}"

    @property
    def refitted(self) -> int:
        """The number of layers whose weights it changed."""
        return sum(layer.strength is not None for layer in self.layers) + len(self.filled)


@dataclass(frozen=True, slots=True)
class Refit:
    """One refitted layer.

    `before` and `after` are the errors of its output on held-out samples, in shares of the output's variance;
    `strength` is the ridge's, or None where the layer was left unchanged.
    """

    layer: str
    before: float
    after: float
    strength: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The original on the calibration data, as scoring measured it.

    `loss` is the mean over the samples. `accuracy` is the share of class numbers that it gets right among `outputs`
    classes; None where its outputs and the targets are no logits and class numbers.

    >>> print(Calibration(300, 0.0312, 0.99, 10))
    the original on 300 calibration samples: loss 0.0312, right on 99.0%
    """

    samples: int
    loss: float
    accuracy: float | None = None
    outputs: int | None = None

    def __str__(self) -> str:
        right = "" if self.accuracy is None else f", right on {self.accuracy:.1%}"
        few = "; these are few samples, give some hundred" if self.samples < FEW else ""
        return f"the original on {plural(self.samples, 'calibration sample')}: loss {self.loss:.3g}{right}{few}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A figure of the caller's, such as the accuracy on held-out data; `before` is the original's, where measured."""

    name: str
    before: float | None
    after: float


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """What `compress` or `apply` was asked to do, and what it achieved.

    Parameters are numbers before and after, MACs are per sample. `alpha` is the level of the plan, and `budget` what
    was asked for in its place. `error` is that of `verify` on the plain removal, before compensation and fine-tuning,
    or None where it did not run. `whole` are the parameters of the whole model, before and after, where only a part of
    it was pruned; all else is then about that part. `captured` says how the model was captured: "fx" or
    "values". `params_after` includes the biases that `compensation` created.

    `weight_bytes` counts all parameters and buffers, before and after. `layers` are the largest that remain. `signals`
    names the signals that proposed and protected units. `latency` is what `measure_latency` found for the whole model.
    `calibration` is what scoring measured of the original, `evaluation` what the caller's function measured.
    `provenance` says how the model was made. `widths` are the channels before and after of every layer that has
    channels, in the order in which the graph calls the layers. `routers` are the layers that choose among experts.
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
    weight_bytes: tuple[int, int] | None = None
    layers: tuple[LayerReport, ...] = ()
    signals: tuple[str, str] | None = None
    latency: MeasuredLatency | None = None
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    provenance: Provenance | None = None
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    routers: tuple[RouterReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers."""
        return asdict(self)
