"""Runs of the caller's model, and of its graph, on batches, under one seed."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call, as_fields, batch_length, trim
from fxprune.caller.isolation import attributes_restored, evaluating, full_float32, seeded
from fxprune.caller.other_batches import varied_batch
from fxprune.errors import CaptureError
from fxprune.tracing.checks import cuts, first_running, signature_of
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.hooks import hooks_in_words, hooks_of
from fxprune.tracing.outside import all_restored

_SEED = 20_231  # none that a forward is traced with: what it draws must not be a constant of the graph


@dataclass(frozen=True, slots=True)
class Trial:
    """A batch, the model's output on it, and whether gradients were recorded."""

    batch: Any
    output: Any
    grad: bool


def first_run(own: nn.Module, example: Any, concrete: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two samples of the example, or else the whole, on which a model, a copy of our own, runs; and its output.

    Raises CaptureError, which names hooks and forwards that are set on instances, where it runs on neither.
    """
    try:
        return first_running(own, cuts(example), lambda batch: call_model(own, batch, concrete))
    except CaptureError as error:
        raise CaptureError(f"{error}{hooks_in_words(own, list(hooks_of(own)))}") from error.__cause__


def second_trial(
    own: nn.Module, batch: Any, other: Any, concrete: Mapping[str, Any], drawn: set[str] | None = None
) -> Iterator[Trial]:
    """Another batch, of another number of samples where the model takes one; none where it takes no other batch."""
    made = (varied_batch(batch, batch_length(batch) + 1), varied_batch(batch, batch_length(batch)))
    given = () if other is None else (trim(other, samples=3), other)
    found = chain.from_iterable(tried(own, batch, concrete, drawn) for batch in (*given, *made))
    yield from islice(found, 1)


def other_sizes(example: Any, batch: Any) -> Iterator[Any]:
    """The whole example, and one sample like it, where these have another number of samples than its part, `batch`."""
    for other in (example, varied_batch(example, 1)):
        if batch_length(other) != batch_length(batch) and (other is example or batch_length(other) == 1):
            yield other


def tried(
    own: nn.Module,
    batch: Any,
    concrete: Mapping[str, Any],
    drawn: set[str] | None = None,
    grads: Sequence[bool] = (True, False),
) -> Iterator[Trial]:
    """A model's output on a batch, with gradients recorded if possible; nothing where it does not run."""
    for grad in grads:
        try:
            output = call_model(own, batch, concrete, grad=grad, drawn=drawn)
        except Exception:  # noqa: BLE001, S112 - the caller's model takes no such batch, whatever it says
            continue
        yield Trial(batch, output, grad)
        return


def tried_afresh(own: nn.Module, batch: Any, concrete: Mapping[str, Any], grads: Sequence[bool]) -> Iterator[Trial]:
    """As `tried`, and what the forward changes is put back."""
    with all_restored(own):
        found = list(tried(own, batch, concrete, grads=grads))
    yield from found


def call_model(
    own: nn.Module, batch: Any, concrete: Mapping[str, Any], *, grad: bool = False, drawn: set[str] | None = None
) -> Any:
    """The output of a model on a copy of a batch; the generators that it draws from are added to `drawn`."""
    args, kwargs = arguments_of(own, batch, concrete)
    return run_under_seed(own, args, kwargs, grad=grad, drawn=drawn)


def arguments_of(own: nn.Module, batch: Any, concrete: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The positional and keyword arguments of a model's forward, from a copy of a batch and what is concrete."""
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, batch))
    if concrete:  # which may stand between the positional ones
        args, kwargs = (), dict(signature_of(own, concrete).bind(*args, **kwargs).arguments)
        for name, parameter in inspect.signature(own.forward).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                args = kwargs.pop(name, ())
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= kwargs.pop(name, {})
    return args, {**kwargs, **concrete}


def run_graph(graph: ModelGraph, trial: Trial) -> Any:
    """The output of a graph on the batch of a trial; the graph is left as it was."""
    with evaluating(graph), attributes_restored(graph):
        return run_under_seed(graph.forward, placeholder_values(graph, trial.batch), {}, grad=trial.grad)


def run_under_seed(function: Any, args: Any, kwargs: Any, *, grad: bool, drawn: set[str] | None = None) -> Any:
    """The result of a function, with all generators at one seed, and without its warnings.

    torch's fast path through transformer layers, which gives zeros where samples are padded, is not taken.
    """
    with seeded(_SEED), full_float32(), torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)  # type: ignore[no-untyped-call]
        before = _generators()
        output = pytree.tree_map_only(Tensor, torch.detach, as_fields(function(*args, **kwargs)))
        if drawn is not None:
            drawn |= {name for name, state in _generators().items() if state != before[name]}
        return output


def _generators() -> dict[str, Any]:
    """The states of the random generators of the process, by their owners."""
    numpy: Any = np.random.get_state()
    ours = bytes(torch.get_rng_state().tolist())
    return {"torch": ours, "Python's random": random.getstate(), "NumPy": (numpy[1].tobytes(), *numpy[2:])}
