"""Runs of the caller's model, and of its graph, on batches, under one seed."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call, as_fields, batch_length, copied, has_twins, trim
from fxprune.caller.isolation import attributes_restored, evaluating, full_float32, kept_buffers, seeded
from fxprune.caller.other_batches import varied_batch
from fxprune.errors import CaptureError
from fxprune.tracing.agreement import agree
from fxprune.tracing.checks import cuts, first_running, signature_of
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.hooks import failed_in_hook, hooks_in_words, hooks_of, plain_copy
from fxprune.tracing.outside import Outside

_SEED = 20_231  # none that a forward is traced with: what it draws must not be a constant of the graph


@dataclass(frozen=True, slots=True)
class Trial:
    """A batch, the model's output on it, whether gradients were recorded, and the batch as the model left it.

    `left` is None where the model writes into none of its inputs.
    """

    batch: Any
    output: Any
    grad: bool
    left: Any = None


class Original:
    """A copy of the caller's model in eval mode, with its forward hooks, to be run on batches.

    `concrete` are arguments of the forward that are fixed, and `outside` is what its code names outside of it.
    """

    def __init__(self, model: nn.Module, concrete: Mapping[str, Any]) -> None:
        self.model, self.concrete = plain_copy(model), concrete
        self.outside = Outside(self.model)

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put back afterwards what forwards change, in the copy and outside of it."""
        try:
            with attributes_restored(self.model), kept_buffers(self.model):
                yield
        finally:
            self.outside.restore()

    def call(self, batch: Any, *, grad: bool = False, drawn: set[str] | None = None) -> Any:
        """The output on a batch; the generators that the forward draws from are added to `drawn`."""
        args, kwargs = self.arguments(batch)
        return run_under_seed(self.model, args, kwargs, grad=grad, drawn=drawn)

    def arguments(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The positional and keyword arguments of the forward, from a batch and what is concrete."""
        args, kwargs = as_call(batch)
        if self.concrete:  # which may stand between the positional ones
            args, kwargs = (), dict(signature_of(self.model, self.concrete).bind(*args, **kwargs).arguments)
            for name, parameter in inspect.signature(self.model.forward).parameters.items():
                if parameter.kind is parameter.VAR_POSITIONAL:
                    args = kwargs.pop(name, ())
                elif parameter.kind is parameter.VAR_KEYWORD:
                    kwargs |= kwargs.pop(name, {})
        return args, {**kwargs, **self.concrete}

    def first_run(self, example: Any) -> tuple[Any, Any]:
        """Two samples of the example, or else the whole, on which the model runs; and its output.

        Raises CaptureError, which names hooks and forwards that are set on instances, where it runs on neither.
        """
        try:
            return first_running(self.model, cuts(example), lambda batch: self.call(copied(batch)))
        except CaptureError as error:
            if failed := failed_in_hook(self.model, error.__cause__ or error):
                raise failed from error.__cause__
            hooks = hooks_in_words(self.model, list(hooks_of(self.model)))
            raise CaptureError(f"{error}{hooks}") from error.__cause__

    def second_trial(self, batch: Any, other: Any, drawn: set[str] | None = None) -> list[Trial]:
        """Another batch, of another number of samples where the model takes one; none where it takes no other batch."""
        made = (varied_batch(batch, batch_length(batch) + 1), varied_batch(batch, batch_length(batch)))
        given = () if other is None else (trim(other, samples=3), other)
        return next((found for batch in (*given, *made) if (found := self.tried(batch, drawn=drawn))), [])

    def tried(self, batch: Any, grads: Sequence[bool] = (True, False), drawn: set[str] | None = None) -> list[Trial]:
        """The output on a batch, with gradients recorded if possible; nothing where the model does not run."""
        for grad in grads:
            given = copied(batch)
            try:
                output = self.call(given, grad=grad, drawn=drawn)
            except Exception:  # noqa: BLE001, S112 - the caller's model takes no such batch, whatever it says
                continue
            return [Trial(batch, output, grad, None if agree(batch, given) else given)]
        return []

    def tried_afresh(self, batch: Any, grads: Sequence[bool] = (True, False)) -> list[Trial]:
        """As `tried`, and what the forward changes is put back."""
        with self.restored():
            return self.tried(batch, grads)


def other_sizes(example: Any, batch: Any) -> Iterator[Any]:
    """The whole example and one sample of it, where their numbers of samples differ from that of its part `batch`.

    The whole is also tried if it holds one tensor twice: the part holds two, and a forward may ask for that.
    """
    one, length = varied_batch(example, 1), batch_length(batch)
    if batch_length(example) != length or has_twins(example):
        yield example
    if batch_length(one) == 1 != length:
        yield one


def begins_with(output: Any, first: Any) -> bool:
    """Whether the rows of a model's output begin with those of another output, for fewer samples.

    The model then does for many samples what it does for few, so that a graph need not run on many.
    """
    many, few = pytree.tree_leaves(output), pytree.tree_leaves(first)
    return len(many) == len(few) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and b.ndim > 0 and len(a) > len(b) and agree(b, a[: len(b)])
        for a, b in zip(many, few, strict=True)
    )


def run_graph(graph: ModelGraph, trial: Trial) -> Any:
    """The output of a graph on the batch of a trial; the graph is left as it was."""
    with evaluating(graph), attributes_restored(graph):
        return run_under_seed(graph.forward, placeholder_values(graph, trial.batch), {}, grad=trial.grad)


def leaves_inputs_alike(graph: ModelGraph, trial: Trial) -> bool:
    """Whether a graph leaves its inputs as the model left them."""
    values = placeholder_values(graph, trial.batch)
    with evaluating(graph), attributes_restored(graph):
        run_under_seed(graph.forward, values, {}, grad=trial.grad)
    return agree(placeholder_values(graph, trial.left), values)


def run_under_seed(function: Any, args: Any, kwargs: Any, *, grad: bool, drawn: set[str] | None = None) -> Any:
    """The result of a function, with all generators at one seed, and without its warnings.

    torch's fast path through transformer layers, which gives zeros where samples are padded, is not taken.
    """
    with seeded(_SEED), full_float32(), torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)  # type: ignore[no-untyped-call]
        before = _generators()
        output = copy_context().run(function, *args, **kwargs)  # what it sets in context variables is dropped
        output = pytree.tree_map_only(Tensor, torch.detach, as_fields(output))
        if drawn is not None:
            drawn |= {name for name, state in _generators().items() if state != before[name]}
        return output


def _generators() -> dict[str, Any]:
    """The states of the random generators of the process, by their owners."""
    numpy: Any = np.random.get_state()
    ours = bytes(torch.get_rng_state().tolist())
    return {"torch": ours, "Python's random": random.getstate(), "NumPy": (numpy[1].tobytes(), *numpy[2:])}
