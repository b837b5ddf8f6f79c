"""The loss and the accuracy of the original on the calibration data, summed up while the scoring pass runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import log, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.caller.ranks import gathered, rank_and_size, summed
from fxprune.caller.source_lines import warn

FEWEST = 100  # samples, below which nothing is said about chance
UNKNOWN = -1


@dataclass(slots=True)
class Original:
    """Sums over all batches: the samples' losses, the positions that have class numbers, and those that are right.

    `outputs` is the number of classes among which the output chooses: 0 where outputs and targets are no logits and
    class numbers, and `UNKNOWN` before the first batch.
    """

    loss: float = 0.0
    right: int = 0
    judged: int = 0
    outputs: int = UNKNOWN

    def add(self, loss: Tensor, output: Any, targets: Any, of: Any) -> None:
        """Add a batch: its summed loss, and its output and targets; `of` is the function that gave the loss."""
        self.loss += float(loss.detach())
        logits: Any = output.get("logits") if isinstance(output, Mapping) else output
        classes = 0 if self.outputs == 0 else classes_of(logits, targets, of)
        self.outputs = classes if self.outputs in (UNKNOWN, classes) else 0
        if self.outputs:
            counted = _counted(targets, of)
            right = (logits.detach().argmax(1).to(targets.device) == targets) & counted
            self.right, self.judged = self.right + int(right.sum()), self.judged + int(counted.sum())

    def merge_ranks(self) -> None:
        """Sum up over all ranks."""
        self.loss = float(summed(torch.tensor(self.loss, dtype=torch.float64)))
        self.right, self.judged = summed(torch.tensor([self.right, self.judged])).tolist()
        known = {int(part) for part in gathered(torch.tensor([self.outputs]))} - {UNKNOWN}
        self.outputs = known.pop() if len(known) == 1 else 0

    def about(self, samples: int, *, by_class: bool) -> dict[str, Any]:
        """The mean "loss" of so many samples; where there are class numbers, the "accuracy" and number of "outputs".

        Unless the loss is `by_class`, torch's own cross-entropy, it may give the class numbers another meaning: then an
        accuracy that is no better than chance says nothing and is left out.
        """
        found: dict[str, Any] = {"loss": float(f"{self.loss / max(samples, 1):.6g}")}  # the same on any number of ranks
        if self.outputs > 0 and self.judged:
            accuracy = self.right / self.judged
            if by_class or accuracy > chance(self.outputs, samples):
                found |= {"accuracy": accuracy, "outputs": self.outputs}
        return found

    def restore(self, other: Original) -> None:
        """Take the sums of another."""
        self.loss, self.right, self.judged, self.outputs = astuple(other)


def classes_of(output: Any, targets: Any, loss: Any) -> int:
    """The number of classes of logits (N, classes, *positions) for class numbers (N, *positions); 0 for anything else.

    Where the classes may as well lie on the last axis, cross-entropy alone says that they do not.

    >>> classes_of(torch.zeros(4, 3), torch.tensor([0, 2, 1, -100]), F.cross_entropy)
    3
    >>> classes_of(torch.zeros(4, 3), torch.tensor([0, 3, 1, 0]), F.cross_entropy)
    0
    """
    if not all(isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested for t in (output, targets)):
        return 0
    numbers = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not numbers or not output.is_floating_point() or output.ndim < 2 or output.shape[1] < 2:
        return 0
    shape, classes = tuple(output.shape), output.shape[1]
    on_last_axis = len(shape) > 2 and shape[:-1] == tuple(targets.shape) and loss is not F.cross_entropy
    if (*shape[:1], *shape[2:]) != tuple(targets.shape) or on_last_axis:
        return 0
    largest = torch.where(_counted(targets, loss), targets, 0).amax() if targets.numel() else 0
    return classes if int(largest) < classes else 0


def _counted(targets: Tensor, loss: Any) -> Tensor:
    """The class numbers that count: none that is negative, or that the loss ignores."""
    return (targets >= 0) & (targets != getattr(loss, "ignore_index", -1))


def chance(classes: int, samples: int) -> float:
    """The accuracy of guessing among so many classes, and two standard errors.

    >>> round(chance(10, 900), 2)
    0.12
    """
    return 1 / classes + 2 * sqrt((1 - 1 / classes) / classes / max(samples, 1))


def warn_near_chance(about: Mapping[str, Any], *, by_class: bool, pruned: bool) -> None:
    """Warn where the accuracy is not clearly above that of guessing: by two standard errors, of 100 samples or more.

    The positions of a sample depend on each other, so samples are what is counted. A model that is right on less than
    half is no better than guessing, too, where its cross-entropy is larger; `by_class` says that the loss is that one,
    and `pruned` whether the model was pruned before.
    """
    if "accuracy" not in about or about["samples"] < FEWEST or rank_and_size()[0]:
        return
    accuracy, samples, classes = about["accuracy"], about["samples"], about["outputs"]
    if accuracy <= chance(classes, samples):
        name, reason = "the original", "wrong preprocessing, labels or weights?"
        if pruned:
            name, reason = "the model as pruned so far", "it lost more than it can do without"
        warn(
            f"{name} is right on {accuracy:.1%} of these {samples:,} samples, no more than guessing among {classes:,} "
            f"classes would be: {reason}"
        )
    elif by_class and not pruned and accuracy < 1 / 2 and about["loss"] > log(classes):
        warn(
            f"the original is right on {accuracy:.1%} of these {samples:,} samples, and its loss is "
            f"{about['loss']:.3g}, more than the {log(classes):.3g} of guessing among {classes:,} classes: wrong "
            "preprocessing, labels or weights?"
        )
