"""The accuracy of a model, and its latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.caller.batches import LONGEST_EPOCH, Unpack, batches
from fxprune.caller.example import to_device
from fxprune.caller.isolation import device_of, evaluating
from fxprune.caller.source_lines import warn
from fxprune.caller.tensors import dtype_name
from fxprune.caller.timing import timer_of
from fxprune.cli.named_objects import told_with_line
from fxprune.cli.output import Bars
from fxprune.errors import FxpruneError
from fxprune.reporting.measured_latency import in_turns
from fxprune.scoring.original import FEWEST, chance
from fxprune.tracing.part import call_whole

Metric = Callable[[nn.Module, Iterable[Any]], float]
TURNS = 7  # of each model


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An evaluation: a metric, its name, and the data for it."""

    name: str
    metric: Metric
    loader: Iterable[Any]
    counts: dict[str, int] = field(default_factory=dict)  # of an accuracy: the samples and the classes

    def before(self, model: nn.Module, bars: Bars) -> float:
        """The metric of the original; an accuracy that is no better than that of guessing gives a warning."""
        found = self.value(model, bars)
        counts = self.counts
        if counts and counts["samples"] >= FEWEST and found <= chance(counts["classes"], counts["samples"]):
            warn(
                f"the original is right on {found:.1%} of the {counts['samples']:,} evaluation samples, no more than "
                f"guessing among {counts['classes']:,} classes would be: wrong preprocessing, labels or weights?"
            )
        return found

    def value(self, model: nn.Module, bars: Bars) -> float:
        """The metric of a model. Raises FxpruneError where the model, or a metric of the caller's, fails."""
        try:
            return float(self.metric(model, bars.over(self.loader, "evaluating")))
        except FxpruneError:
            raise
        except Exception as error:
            raise FxpruneError(f"{type(model).__name__} cannot be evaluated: {told_with_line(error)}") from error


def accuracy(
    model: nn.Module, loader: Iterable[Any], unpack: Unpack | None = None, counts: dict[str, int] | None = None
) -> float:
    """The share of samples whose class has the largest of the model's outputs (N, classes).

    `counts` gets the number of samples and of classes.

    Raises FxpruneError where outputs or targets have another form, or a class is none of the outputs'.

    >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
    0.75
    """
    right = total = 0
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        for inputs, targets in batches(loader, unpack, name="the evaluation's loader", most=LONGEST_EPOCH):
            output = call_whole(model, to_device(inputs, device), targets, run=None)
            fits = isinstance(output, Tensor) and isinstance(targets, Tensor) and output.ndim == 2 and targets.ndim == 1
            if not fits or len(output) != len(targets) or targets.is_floating_point():
                forms = [_form(value) for value in (output, targets)]
                raise FxpruneError(
                    f"the model gives {forms[0]} for targets {forms[1]}, and accuracy needs (N, classes) for (N,) "
                    "class numbers: pass --eval-metric, a function (model, loader) -> number"
                )
            if int(targets.max()) >= output.shape[1]:
                raise FxpruneError(
                    f"the targets for evaluation hold class {int(targets.max())}, and the output has {output.shape[1]} "
                    f"classes, 0 to {output.shape[1] - 1}: give the labels that the model was trained with"
                )
            right += int((output.argmax(1).cpu() == targets.cpu()).sum())
            total += len(targets)
    if counts is not None:
        counts |= {"samples": total, "classes": output.shape[1]}
    return right / total


def _form(value: Any) -> str:
    return f"{dtype_name(value)} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def latencies(models: Sequence[nn.Module], batch: Any) -> list[float]:
    """Milliseconds that each model takes for a batch: the median over turns of the models."""
    device = device_of(models[0])
    timers = [timer_of(model, to_device(batch, device), device, torch.get_num_threads()) for model in models]
    with torch.inference_mode():
        return [1e3 * timing.median for timing in in_turns(timers, TURNS, math.inf)]
