"""The objective of scoring: the loss of one batch as a function of the gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import count_of, fitted, sample_count
from fxprune.caller.example import as_call, check_dense
from fxprune.caller.tensors import dtype_name
from fxprune.errors import CalibrationError, blaming
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.finite import not_finite
from fxprune.tracing.graph import ModelGraph, plain_attributes
from fxprune.tracing.part import Run, call_whole

Loss = Callable[[Any, Any], Tensor]


class Part(nn.Module):
    """A gated graph in the place that its original has in a model; in eval mode, whatever mode the model is put into.

    `graph` is that original. `samples` is the number of samples that its first input of a batch should have, where that
    is known; `seen` its last input of the batch.
    """

    graph: ModelGraph

    def __init__(self, gated: fx.GraphModule, graph: ModelGraph, name: str) -> None:
        super().__init__()
        self.gated, self.name = gated, name
        vars(self)["graph"] = graph  # no submodule: the modules that the two share are there once
        self.samples: int | None = None
        self.seen: list[Any] | None = None
        vars(self).update({name: value for name, value in plain_attributes(graph).items() if name not in vars(self)})

    def train(self, mode: bool = True) -> Part:  # noqa: FBT001, FBT002 - torch's signature
        """Stay in eval mode."""
        del mode
        return super().train(mode=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated graph's output."""
        example: Any = args or kwargs
        if args and kwargs:
            example = inspect.signature(self.gated.forward).bind(*args, **kwargs).arguments
        if not self.called:
            self._check(example)
        values = placeholder_values(self.gated, example)
        self.seen = pytree.tree_map_only(Tensor, torch.detach, values)
        return self.gated(*values)

    def on(self, example: Any) -> Any:
        """The output for an example: a tensor, a tuple of positional arguments or a dict of named ones."""
        args, kwargs = as_call(example)
        return self(*args, **kwargs)

    @property
    def called(self) -> bool:
        """Whether there was an input since `seen` was cleared."""
        return self.seen is not None

    def _check(self, example: Any) -> None:
        if self.samples is not None and sample_count(example) != self.samples:
            raise CalibrationError(
                f"{self.name} runs on {sample_count(example)} samples, but the batch has classes for {self.samples}: "
                "pass classes=, a function from targets to one class for each row of the part's input"
            )


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a batch: of the whole model that `part` stands in, which is `part` itself where that is the whole."""

    whole: nn.Module
    part: Part
    loss: Loss
    run: Run | None

    @property
    def counts_rows(self) -> bool:
        """Whether the batch's own axis says how many samples there are; else the classes do."""
        return self.whole is self.part and self.run is None

    def fitted(self, inputs: Any) -> Any:
        """Inputs as the model takes them."""
        if not self.counts_rows:
            return inputs
        return fitted(inputs, [str(node.target) for node in self.part.gated.graph.nodes if node.op == "placeholder"])

    def count(self, inputs: Any, targets: Any) -> int:
        """The number of samples of a batch."""
        return sample_count(self.fitted(inputs)) if self.counts_rows else count_of(inputs, targets)

    def value(self, inputs: Any, targets: Any, samples: int | None, index: int) -> Tensor:
        """The loss of batch `index`. Raises CalibrationError where it is not one finite number."""
        self.part.samples = None if self.counts_rows else samples
        self.part.seen = None
        value = self._ran(inputs, targets, index) if self.run else self._lost(inputs, targets, index)
        if not self.part.called:
            raise CalibrationError(f"{self.part.name} was not called on batch {index}: there is nothing to score there")
        value = one_number(value, f"the loss of batch {index}")
        if not bool(torch.isfinite(value.detach())):
            raise CalibrationError(
                f"the loss of batch {index} is {float(value.detach())}{_first_not_finite(self.part)}"
            )
        return value

    def check_reached(self, totals: list[Tensor], reached: bool) -> None:  # noqa: FBT001
        """Raise where no loss depended on a gate, or one of the user's gave no gradient for any."""
        zero = not self.counts_rows and not any(bool(total.any()) for total in totals)
        if totals and (zero or not reached):
            raise CalibrationError(
                f"the loss does not depend on {self.part.name}: its gradient is 0 on every batch; look for "
                "torch.no_grad(), detach(), item() or a loss of 0 between the two"
            )

    def _ran(self, inputs: Any, targets: Any, index: int) -> Any:
        """What `run` gives."""
        remedy = ": it is called as run(model, inputs, targets) and returns the mean loss of the batch"
        with blaming("run=", f"batch {index}", remedy):
            return call_whole(self.whole, inputs, targets, run=self.run)

    def _lost(self, inputs: Any, targets: Any, index: int) -> Any:
        """The loss of the model's output."""
        with blaming("the model", f"batch {index}"):
            output = self.part.on(inputs) if self.counts_rows else call_whole(self.whole, inputs, targets, run=None)
        return loss_of(self.loss, output, targets, f"batch {index}")


def one_number(value: Any, what: str) -> Tensor:
    """`value`, which messages call `what`. Raises CalibrationError where it is not one real number in a tensor."""
    check_dense(value, what, CalibrationError, strided=True)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value
    found = f"type {type(value).__name__}"
    if isinstance(value, Tensor):
        found = f"dtype {dtype_name(value)}" if value.numel() == 1 else f"shape {tuple(value.shape)}"
    raise CalibrationError(f"{what} has {found}: it must be one number, the mean over the batch, in a tensor")


def loss_of(loss: Loss, output: Any, targets: Any, where: str) -> Any:
    """The loss of an output. Raises CalibrationError, which says `where`, if the loss cannot be taken."""
    name = getattr(loss, "__name__", type(loss).__name__)
    with blaming(f"the loss {name}", where, ": pass loss=, a callable(output, target) that fits the model's output"):
        return loss(output, targets)


def _first_not_finite(part: Part) -> str:
    """Which value of the batch is the first that is not finite, in words."""
    found = not_finite(part.graph, part.seen or ())
    return ": the output is finite, look at the loss and the targets" if found is None else f": {found}"
