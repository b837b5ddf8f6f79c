"""The objective of fine-tuning: a loss, and the divergence from a teacher's logits where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.caller.example import as_fields, check_dense
from fxprune.errors import CalibrationError, FxpruneError, a_kind, blaming
from fxprune.scoring.objective import Loss, loss_of, one_number
from fxprune.tracing.part import Run, call_whole

Metric = Callable[[Any, Any], Any]
Logits = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True)
class Distillation:
    """A teacher in eval mode, its share in the loss, and how its logits are compared.

    `logits` returns the logits of an output, with the classes along the last axis; `classes_last` is the default.
    """

    teacher: nn.Module
    share: float
    temperature: float
    logits: Logits

    def divergence(self, output: Any, inputs: Any, targets: Any, where: str) -> Tensor:
        """T^2 KL(teacher || student) of the softened classes, mean over samples and positions (arXiv 1503.02531)."""
        with torch.no_grad():
            with blaming("the teacher", where):
                guide = call_whole(self.teacher, inputs, targets, run=None)
            wanted = self._logits_of(guide, where)
        found = self._logits_of(output, where)
        if found.shape != wanted.shape:
            raise FxpruneError(
                f"the logits have shape {tuple(found.shape)}, the teacher's {tuple(wanted.shape)}: give a teacher of "
                "the same classes, or logits=, a function from an output to logits"
            )
        student, teacher = (F.log_softmax(x / self.temperature, -1) for x in (found, wanted))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
        return divergence * self.temperature**2

    def _logits_of(self, output: Any, where: str) -> Tensor:
        """The logits of an output. Raises CalibrationError where `logits` fails, or gives something else."""
        with blaming("logits=", where):
            found: Any = self.logits(output)
        check_dense(found, f"what logits= gives on {where}", CalibrationError, strided=True)
        if not isinstance(found, Tensor) or found.is_complex() or not found.ndim:
            raise CalibrationError(
                f"logits= gives {a_kind(found)} on {where}: it is a function from an output to a tensor of "
                "logits with the classes along the last axis"
            )
        return found


def classes_last(output: Any) -> Tensor:
    """The logits of an output, a tensor or an object with `logits`, with the classes along the last axis.

    The classes are expected along axis 1, as in (N, C) and (N, C, H, W); of three axes along the last, as in (N, T, C).

    >>> classes_last(torch.zeros(2, 5, 8, 8)).shape
    torch.Size([2, 8, 8, 5])
    """
    named = as_fields(output)
    found = named.get("logits") if isinstance(named, Mapping) else output
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise FxpruneError(
            f"the model gives {a_kind(output)}, which is no tensor of logits and has none by that name: pass "
            "logits=, a function from an output to logits with the classes along the last axis"
        )
    return found if found.ndim == 3 else found.movedim(1, -1)


@dataclass(frozen=True, slots=True)
class Goal:
    """The loss and the metric of one batch, of `model`."""

    model: nn.Module
    loss: Loss
    run: Run | None = None
    metric: Metric | None = None
    distillation: Distillation | None = None

    @property
    def share(self) -> float:
        """The teacher's share in the loss."""
        return self.distillation.share if self.distillation else 0.0

    def value(self, inputs: Any, targets: Any, where: str) -> Tensor:
        """The loss to train by. Raises CalibrationError, with the batch, where it is not one finite number."""
        output = self._output(inputs, targets, where)
        parts = []
        if self.share < 1:
            parts.append((1 - self.share) * self._lost(output, targets, where))
        if self.distillation:
            parts.append(self.share * self.distillation.divergence(output, inputs, targets, where))
        value = _finite(sum(parts), "loss", where)
        if not value.requires_grad:
            raise CalibrationError(
                f"the loss of {where} does not depend on a parameter that is trained: look for torch.no_grad() or "
                "detach() between the two"
            )
        return value

    @torch.no_grad()
    def judged(self, inputs: Any, targets: Any, where: str) -> tuple[float, float]:
        """The loss, the teacher's only where there is no other, and the metric (0 where there is none)."""
        output = self._output(inputs, targets, where)
        if self.distillation and self.share == 1:
            lost = self.distillation.divergence(output, inputs, targets, where)
        else:
            lost = self._lost(output, targets, where)
        with blaming("metric=", where):
            metric = torch.as_tensor(self.metric(output, targets) if self.metric else 0.0)
        return float(_finite(lost, "loss", where)), float(_finite(metric, "metric", where))

    def _output(self, inputs: Any, targets: Any, where: str) -> Any:
        """The model's output, or the result of `run`."""
        with blaming("run=" if self.run else "the model", where):
            return call_whole(self.model, inputs, targets, run=self.run)

    def _lost(self, output: Any, targets: Any, where: str) -> Any:
        """The loss of an output; that of `run` is a loss already."""
        return output if self.run else loss_of(self.loss, output, targets, where)


def _finite(value: Any, name: str, where: str) -> Tensor:
    """`value`. Raises CalibrationError where it is not one finite number."""
    number = one_number(value, f"the {name} of {where}")
    if not bool(torch.isfinite(number.detach())):
        raise CalibrationError(
            f"the {name} of {where} is {float(number.detach())}: look at the inputs and the targets of that batch, and "
            "lower lr= where earlier batches were finite"
        )
    return number
