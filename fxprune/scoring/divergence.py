"""The divergence of a model's outputs from the original's: what users lose, without labels.

Outputs that are distributions, and the logits of distributions, differ by the Kullback-Leibler divergence, a position;
all others by the squared error, in shares of the variance of the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.batches import Unpack, batches
from fxprune.errors import blaming
from fxprune.scoring.calibration import Calibration
from fxprune.tracing.finite import floating_outputs, floats
from fxprune.tracing.graph import ModelGraph

Metric = Callable[[Any, Any], float]
TINY = 1e-12  # the least variance of an output
SUMS = 1e-3  # how far the sums of a distribution may be from 1


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of outputs from the original's, summed over the floating outputs.

    `logits` are the (place, axis) of outputs that are the logits of classes along that axis. `variances` are those of
    the original's outputs, by which squared errors are divided; without them, the variance of the outputs at hand is.
    A `metric` of the caller's, of the original's outputs and the others, is taken in place of all of it.
    """

    logits: tuple[tuple[int, int], ...] = ()
    variances: tuple[float, ...] = ()
    metric: Metric | None = None

    def __call__(self, wanted: Any, found: Any) -> float:
        """How far the outputs `found` are from those `wanted`, of the same form.

        Raises CalibrationError where a metric of the caller's fails.
        """
        if self.metric is not None:
            with blaming("metric=", "the outputs", ": it is called as metric(original, pruned), 0 for equal outputs"):
                return float(self.metric(wanted, found))
        goals, axes = floats(wanted), dict(self.logits)
        variances = self.variances or (None,) * len(goals)
        parts = zip(goals, floats(found), variances, strict=True)
        return float(sum(_apart(a, b, axes.get(i), variance) for i, (a, b, variance) in enumerate(parts)))

    @property
    def measure(self) -> str:
        """The name of the measure."""
        if self.metric is not None:
            return str(getattr(self.metric, "__name__", type(self.metric).__name__))
        return "Kullback-Leibler divergence" if self.logits else "squared error, in shares of the variance"

    def scaled(self, goals: Sequence[Any], summed: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Divergence:
        """The same with the variances of an original's outputs on several batches; `summed` adds those of all ranks."""
        found = []
        for outputs in zip(*map(floats, goals), strict=True):
            values = [output[output.isfinite()].double() for output in outputs]
            sums = [torch.stack([v.new_tensor(v.numel()), v.sum(), v.square().sum()]).cpu() for v in values]
            count, total, square = summed(torch.stack(sums).sum(0)).tolist()
            found.append(max(square / max(count, 1) - (total / max(count, 1)) ** 2, TINY))
        return replace(self, variances=tuple(found))


def _apart(wanted: Tensor, found: Tensor, axis: int | None, variance: float | None) -> float:
    wanted, found = wanted.double(), found.double()
    if axis is not None:
        return float(_kl(F.log_softmax(wanted, axis), F.log_softmax(found, axis), axis))
    if (axis := _distribution_axis(wanted)) is not None:
        return float(_kl(wanted.clamp_min(TINY).log(), found.clamp_min(TINY).log(), axis))
    counts = wanted.isfinite()
    wanted, found = wanted[counts], found[counts]
    if not len(wanted):
        return 0.0
    spread = float(wanted.var(correction=0).clamp_min(TINY)) if variance is None else variance
    return float((found - wanted).square().mean()) / spread


def _kl(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """The mean of KL(wanted || found), given logarithms of probabilities along an axis."""
    terms = wanted.exp() * (wanted - found)
    return torch.where(wanted.exp() > 0, terms, torch.zeros_like(terms)).sum(axis).mean()


def _distribution_axis(values: Tensor) -> int | None:
    """The axis along which values are probabilities of more than one class, if there is one."""
    if not values.numel() or float(values.min()) < 0 or float(values.max()) > 1 + SUMS:
        return None
    for axis in range(1, values.ndim):
        if values.shape[axis] > 1 and bool(((values.sum(axis) - 1).abs() < SUMS).all()):
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


def logits_of(
    graph: ModelGraph, data: Calibration, loader: Iterable[Any], unpack: Unpack | None, *, by_class: bool
) -> tuple[tuple[int, int], ...]:
    """The outputs of a graph that are logits, by the first batch; the first one for a cross-entropy of each sample."""
    _, targets = next(batches(loader, unpack))
    outputs = floating_outputs(graph, data.inputs[0])
    found = logits_by(outputs, targets)
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
