"""The objective of scoring: the loss of one batch as a function of the gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import count_of, model_inputs, sample_count
from fxprune.caller.example import as_call, check_dense
from fxprune.caller.tensors import dtype_name
from fxprune.errors import CalibrationError, FxpruneError, blaming
from fxprune.scoring.wrong_targets import check_classes, failure, only_ignored
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.finite import not_finite
from fxprune.tracing.graph import ModelGraph, plain_attributes
from fxprune.tracing.part import Run, call_whole

Loss = Callable[[Any, Any], Tensor]


class GatedPart(nn.Module):
    """A gated graph in the place of its original `graph` in a model; in eval mode whatever mode the model is put into.

    `samples` is the number of samples that its first input of a batch should have, where that is known; `seen` its
    last input of the batch, None before the first.
    """

    graph: ModelGraph

    def __init__(self, gated: fx.GraphModule, graph: ModelGraph, name: str) -> None:
        super().__init__()
        self.gated, self.name = gated, name
        vars(self)["graph"] = graph  # not as a submodule: the two share modules, which would be there twice
        self.samples: int | None = None
        self.seen: Any = None
        vars(self).update({name: value for name, value in plain_attributes(graph).items() if name not in vars(self)})

    def __getattr__(self, name: str) -> Any:
        """What the rest of the model asks of the part: its modules, parameters, buffers, attributes and methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(graph := vars(self)["graph"], name)
            return MethodType(found.__func__, self) if getattr(found, "__self__", None) is graph else found

    def train(self, mode: bool = True) -> GatedPart:  # noqa: FBT001, FBT002 - torch's signature
        """Stay in eval mode."""
        del mode
        return super().train(mode=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated graph's output."""
        example: Any = args or kwargs
        if args and kwargs:
            example = inspect.signature(self.gated.forward).bind(*args, **kwargs).arguments
        if self.seen is None and self.samples is not None and sample_count(example) != self.samples:
            raise CalibrationError(
                f"{self.name} runs on {sample_count(example)} samples, but the batch has classes for {self.samples}: "
                "pass classes=, a function from targets to one class for each row of the part's input"
            )
        values = placeholder_values(self.gated, example)
        self.seen = pytree.tree_map_only(Tensor, torch.detach, values)
        return self.gated(*values)


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a batch: of the `whole` model, which contains `part`, or is it."""

    whole: nn.Module
    part: GatedPart
    loss: Loss
    run: Run | None

    @property
    def counts_rows(self) -> bool:
        """Whether the batch's own axis tells the number of samples; otherwise the classes do."""
        return self.whole is self.part and self.run is None

    def fitted(self, inputs: Any) -> Any:
        """Inputs as the model takes them."""
        if not self.counts_rows:
            return inputs
        nodes = self.part.gated.graph.nodes
        return model_inputs(inputs, [str(node.target) for node in nodes if node.op == "placeholder"])

    def count(self, inputs: Any, targets: Any) -> int:
        """The number of samples of a batch."""
        return sample_count(self.fitted(inputs)) if self.counts_rows else count_of(inputs, targets)

    def value(self, inputs: Any, targets: Any, samples: int | None, index: int) -> tuple[Tensor, Any]:
        """The loss of batch `index`, and the model's output; None where `run` does not call the model just once.

        Raises CalibrationError where the loss is not one finite number.
        """
        part, where = self.part, f"batch {index}"
        part.samples, part.seen = None if self.counts_rows else samples, None
        if self.run:
            remedy = ": it is called as run(model, inputs, targets) and returns the mean loss of the batch"
            with blaming("run=", where, remedy), outputs_of(self.whole) as outputs:
                value: Any = call_whole(self.whole, inputs, targets, run=self.run)
            output: Any = outputs[0] if len(outputs) == 1 else None
        else:
            with blaming("the model", where):
                if self.counts_rows:
                    args, kwargs = as_call(inputs)
                    output = part(*args, **kwargs)
                else:
                    output = call_whole(self.whole, inputs, targets, run=None)
            value = loss_of(self.loss, output, targets, where)
        if part.seen is None:
            raise CalibrationError(f"{part.name} was not called on {where}: there is nothing to score there")
        number = one_number(value, f"the loss of {where}")
        if not bool(torch.isfinite(number.detach())):
            said = not_finite(part.graph, part.seen) or only_ignored(self.loss, targets)
            said = said or "the output is finite, look at the loss and the targets"
            raise CalibrationError(f"the loss of {where} is {float(number.detach())}: {said}")
        return number, output

    def check_reached(self, totals: list[Tensor], reached: bool) -> None:  # noqa: FBT001
        """Raise where no loss depended on a gate, or one of the user's gave no gradient for any."""
        zero = not self.counts_rows and not any(bool(total.any()) for total in totals)
        if totals and (zero or not reached):
            raise CalibrationError(
                f"the loss does not depend on {self.part.name}: its gradient is 0 on every batch; look for "
                "torch.no_grad(), detach(), item() or a loss of 0 between the two"
            )


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """A list to which every call of the model adds its output."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _model, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


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
    """The loss of an output. Raises CalibrationError, naming `where` and what is wrong there, if the loss fails."""
    check_classes(loss, output, targets, where)
    try:
        return loss(output, targets)
    except FxpruneError:
        raise
    except Exception as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise CalibrationError(failure(name, loss, output, targets, where, error)) from error
