"""The divergence of a model's outputs from the original's, measured without labels.

For distributions and the logits of distributions it is the Kullback-Leibler divergence, per position. For all other
outputs it is the squared error, as a share of the variance of the original's output. Of several outputs, the divergence
of each is divided by that of an output that is the same for all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import CalibrationError, blaming
from fxprune.scoring.calibration import Calibration
from fxprune.tracing.finite import floating_outputs, floats
from fxprune.tracing.graph import ModelGraph

Metric = Callable[[Any, Any], float]
DIVERGENCE = "Kullback-Leibler divergence"
TINY = 1e-12  # the least variance of an output
EQUAL = 1e-3  # what a metric may give for equal outputs
SUMS = 1e-3  # how far the sums of a distribution may be from 1


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of outputs from the original's, summed over the floating outputs.

    `logits` are the (place, axis) of outputs that are the logits of classes along that axis. `scaled` fills in the
    other fields: for each output the axis of the classes, if it is a distribution or its logits, and the divergence of
    an output that is the same for all samples (the variance, or the mutual information of sample and class). Squared
    errors are divided by it, and so are Kullback-Leibler divergences where there are several outputs. A `metric` of the
    caller's, of the original's outputs and the others, replaces all of this.
    """

    logits: tuple[tuple[int, int], ...] = ()
    metric: Metric | None = None
    axes: tuple[int | None, ...] = ()
    scales: tuple[float, ...] = ()

    def __call__(self, wanted: Any, found: Any) -> float:
        """How far the outputs `found` are from those `wanted`, of the same form.

        Raises CalibrationError where a metric of the caller's fails.
        """
        if self.metric is not None:
            with blaming("metric=", "the outputs", ": it is called as metric(original, pruned), 0 for equal outputs"):
                value = float(self.metric(wanted, found))
            return _checked(value, "two outputs", value >= 0)
        own = self if self.scales else self.scaled([wanted])
        total, known = 0.0, dict(own.logits)
        for place, pair in enumerate(zip(floats(wanted), floats(found), strict=True)):
            axis, scale = own.axes[place], own.scales[place]
            if axis is None:
                total += _squared(*pair) / scale
            else:
                logs = [_logs(values, axis, logits=place in known) for values in pair]
                total += float(_kl(logs[0], logs[1], axis)) / (scale if len(own.axes) > 1 else 1)
        return total

    @property
    def measure(self) -> str:
        """The name of the measure, once it is scaled."""
        if self.metric is not None:
            name = str(getattr(self.metric, "__name__", type(self.metric).__name__))
            return "metric given" if name == "<lambda>" else name
        if all(axis is None for axis in self.axes):
            return "squared error, in shares of the variance"
        return DIVERGENCE if len(self.axes) == 1 else "error, in shares of the information and variance of the outputs"

    def scaled(self, goals: Sequence[Any], summed: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Divergence:
        """The same for an original with such outputs on several batches; `summed` adds those of all ranks."""
        if self.metric is not None:
            for goal in goals[:1]:
                value = self(goal, goal)
                _checked(value, "the original's outputs and the same once more", abs(value) < EQUAL)
            return self
        known, axes, scales = dict(self.logits), list[int | None](), list[float]()
        for place, outputs in enumerate(zip(*map(floats, goals), strict=True)):
            axis = known.get(place, _distribution_axis(outputs))
            agree = summed(torch.tensor([1.0, 0.0 if axis is None else 1.0, float(axis or 0)]))
            axes.append(axis if agree[0] == agree[1] and agree[2] == agree[0] * (axis or 0) else None)
            spread = _variance if axes[-1] is None else partial(_information, axis=axes[-1], logits=place in known)
            scales.append(max(spread(outputs, summed), TINY))
        return replace(self, axes=tuple(axes), scales=tuple(scales))


def _checked(value: float, of: str, right: bool) -> float:  # noqa: FBT001
    """A metric's value; raises CalibrationError where it is not right, or not finite."""
    if not (right and math.isfinite(value)):
        raise CalibrationError(
            f"metric= gives {value:g} for {of}: it has to be 0 for equal outputs, and larger the more is lost; "
            "give 1 - metric where more is better"
        )
    return value


def _squared(wanted: Tensor, found: Tensor) -> float:
    """The mean squared error where the wanted values are finite."""
    counts = wanted.isfinite()
    return float((found.double()[counts] - wanted.double()[counts]).square().mean()) if bool(counts.any()) else 0.0


def _variance(outputs: Sequence[Tensor], summed: Callable[[Tensor], Tensor]) -> float:
    values = [output[output.isfinite()].double() for output in outputs]
    sums = [torch.stack([v.new_tensor(v.numel()), v.sum(), v.square().sum()]).cpu() for v in values]
    count, total, square = summed(torch.stack(sums).sum(0)).tolist()
    return float(square / max(count, 1) - (total / max(count, 1)) ** 2)


def _information(
    outputs: Sequence[Tensor], summed: Callable[[Tensor], Tensor], *, axis: int | None, logits: bool
) -> float:
    """The mean divergence of distributions from their mean, or from equal chances where batches differ in classes."""
    sums, facts = [], []
    for output in outputs:
        logs = _logs(output, axis or 0, logits=logits).movedim(axis or 0, -1).flatten(0, -2)
        chances, (count, classes) = logs.exp(), logs.shape
        own = float(_terms(chances, logs).sum())
        sums.append(chances.sum(0).cpu())
        facts.append([count, own, own + count * math.log(classes), 1, classes, classes**2])
    totals: list[float] = summed(torch.tensor(facts, dtype=torch.float64).sum(0)).tolist()
    rows, known, gained, batches, total, square = totals
    if batches * square != total**2:
        return gained / rows
    mean = summed(torch.stack(sums).sum(0)) / rows
    return known / rows - float(_terms(mean, mean.log()).sum())


def _logs(values: Tensor, axis: int, *, logits: bool) -> Tensor:
    """The logarithms of probabilities, of their logits or of themselves."""
    return F.log_softmax(values.double(), axis) if logits else values.double().clamp_min(TINY).log()


def _terms(chances: Tensor, logs: Tensor) -> Tensor:
    return torch.where(chances > 0, chances * logs, torch.zeros_like(logs))


def _kl(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """The mean of KL(wanted || found), given logarithms of probabilities along an axis."""
    return _terms(wanted.exp(), wanted - found).sum(axis).mean()


def _distribution_axis(outputs: Sequence[Tensor]) -> int | None:
    """The axis along which all values are probabilities of more than one class, if there is one."""
    if not all(v.numel() and float(v.min()) >= 0 and float(v.max()) <= 1 + SUMS for v in outputs):
        return None
    for axis in range(1, outputs[0].ndim):
        sums = [values.sum(axis) for values in outputs if values.shape[axis] > 1]
        if len(sums) == len(outputs) and all(bool(((total - 1).abs() < SUMS).all()) for total in sums):
            return axis
    return None


def logits_by(output: Any, targets: Any) -> tuple[tuple[int, int], ...]:
    """The outputs that are logits of classes, with the axis of the classes, by targets that are class numbers.

    >>> logits_by(torch.zeros(2, 10), torch.tensor([3, 1]))
    ((0, 1),)
    >>> logits_by(torch.zeros(2, 7, 100), torch.zeros(2, 7, dtype=torch.int64))
    ((0, 2),)
    """
    labels = [t for t in pytree.tree_leaves(targets) if isinstance(t, Tensor) and not t.is_floating_point()]
    found = []
    for place, values in enumerate(floats(output)):
        axes = [axis for t in labels if (axis := _class_axis(values.shape, t)) is not None]
        found += [(place, axes[0])] if axes else []
    return tuple(found)


def logits_of(graph: ModelGraph, data: Calibration, *, by_class: bool) -> tuple[tuple[int, int], ...]:
    """The outputs of a graph that are logits, by the first batch; the first one for a cross-entropy of each sample."""
    outputs = floating_outputs(graph, data.inputs[0])
    found = logits_by(outputs, data.targets)
    return found or (((0, min(1, outputs[0].ndim - 1)),) if by_class and outputs else ())


def _class_axis(shape: Sequence[int], labels: Tensor) -> int | None:
    """The axis of classes in an output for class numbers of one shape: the second, or the last behind positions."""
    size = tuple(labels.shape)
    if labels.dtype == torch.bool or not size or len(shape) != len(size) + 1:
        return None
    for axis in (1, len(shape) - 1):
        if (*shape[:axis], *shape[axis + 1 :]) == size and shape[axis] > max(1, int(labels.max())):
            return axis
    return None
