"""The proof of a captured graph: it is run beside the caller's model, on the example and on another batch."""

from __future__ import annotations

import inspect
import random
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call, as_fields, batch_length, check_dense, trim, varied_batch
from fxprune.caller.isolation import attributes_restored, evaluating, full_float32, kept_buffers, seeded
from fxprune.errors import CaptureError, FxpruneWarning, error_text, is_out_of_memory
from fxprune.tracing.agreement import agree, check_comparable, difference, same_value
from fxprune.tracing.checks import cuts, first_running, signature_of
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph, captured_of, plain_attributes
from fxprune.tracing.hooks import hooks_in_words, hooks_of, plain_copy
from fxprune.tracing.likely_reasons import likely_reasons

_CONTAINERS, _OF_MODULES = (list, dict, set, deque), vars(nn.Module()).keys()
_SEED = 20_231  # none that a forward is traced with: what it draws must not be a constant of the graph


class DisagreementError(CaptureError):
    """A graph gives other outputs than the model that it was captured from."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A batch, the model's output on it, and whether gradients were recorded."""

    batch: Any
    output: Any
    grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The outputs of the caller's model in eval mode, on the example and on other batches.

    The first trial is two samples of the example, or all; then come another batch, the whole example, and one sample of
    it, each where the model takes it. `whole` is the example as it was given. `random` names the generators that a
    forward draws from, `changed` the buffers and attributes whose values it changes; `stateful` says that its output on
    the second batch depends on whether it saw the first.
    """

    model: nn.Module
    concrete: Mapping[str, Any]
    whole: Any
    trials: list[Trial]
    random: frozenset[str]
    changed: tuple[str, ...]
    stateful: bool

    @classmethod
    def of(cls, model: nn.Module, example: Any, other: Any, concrete: Mapping[str, Any]) -> Reference:
        """Run copies of `model`; `other` is another batch, or None where one is to be made of the example.

        Raises CaptureError where the model does not run on the example.
        """
        own, drawn = plain_copy(model), set[str]()
        before = _state(own)
        with attributes_restored(own), kept_buffers(own):
            batch, output = first_run(own, example, concrete)
            check_dense(output, f"the output of {type(model).__name__}", CaptureError, strided=True, meta=True)
            check_comparable(output)
            after = _state(own)
            later = list(_second_trial(own, batch, other, concrete, drawn))
            last = _state(own) if later else {}
        lengths = {name for name, value in after.items() if isinstance(value, str) and value == last.get(name)}
        changed = tuple(
            name for name, value in after.items() if not same_value(value, before.get(name)) and name not in lengths
        )  # but for containers that are filled anew, or once
        sized: list[Trial] = []
        for sizes in _other_sizes(example, batch):
            with attributes_restored(own), kept_buffers(own):
                sized += _tried(own, sizes, concrete, grads=(False,))
        trials = [Trial(batch, output, grad=False), *_second_trial(own, batch, other, concrete), *sized]
        stateful = [trial.output for trial in later], [trial.output for trial in trials[1 : 1 + len(later)]]
        return cls(model, concrete, example, trials, frozenset(drawn), changed, not agree(*stateful))

    @property
    def example(self) -> Any:
        """The part of the example that the model runs on."""
        return self.trials[0].batch

    def warn(self) -> None:
        """Warn where a graph differs from its model: in random numbers, and in what a forward changes."""
        name = type(self.model).__name__
        if "torch" in self.random:
            _say(
                f"{name} draws random numbers in eval mode: its graph draws them, too, and was compared under one seed"
            )
        if others := " and ".join(sorted(self.random - {"torch"})):
            _say(f"{name} draws random numbers from {others} in eval mode: its graph holds those of one run")
        if self.changed or self.stateful:
            what = ", ".join(self.changed[:4]) or "something that is neither a buffer nor a number"
            _say(
                f"the forward of {name} changes {what}: the graph begins with the buffers that the model has now, and "
                "holds all else at the values of the first call"
            )

    def check(self, graph: ModelGraph) -> None:
        """Raise DisagreementError where a graph gives other outputs than the model."""
        if captured_of(graph).by_batch:
            self._try_one_more()
        for trial in self.trials:
            rows = _rows(trial.batch)
            try:
                with evaluating(graph), attributes_restored(graph):
                    values = placeholder_values(graph, trial.batch)
                    found = _run(graph.forward, values, {}, grad=trial.grad)
            except Exception as error:
                raise DisagreementError(
                    f"its graph fails on {rows}, on which the model runs ({error_text(error)})"
                ) from error
            if not agree(trial.output, found):
                raise DisagreementError(
                    f"its graph gives other outputs than the model on {rows} ({difference(trial.output, found)}), "
                    f"first {self._place(graph, trial)}"
                )

    def _try_one_more(self) -> None:
        """Add a batch of one sample more than the example, for graphs made by a decision on the number of samples."""
        samples = batch_length(self.whole) + 1
        if samples not in {batch_length(trial.batch) for trial in self.trials}:
            self.trials.extend(_tried(plain_copy(self.model), varied_batch(self.whole, samples), self.concrete))

    def reason(self) -> str:
        """The likely reason why the graphs differ, in words."""
        if self.random:
            return "it draws random numbers that a graph does not hold: draw with torch, from its own generator"
        first = self.trials[0]
        for trial in _tried(plain_copy(self.model), first.batch, self.concrete):
            if trial.grad and not agree(first.output, trial.output):
                return "it decides by whether gradients are recorded: give the decision an argument of its own"
        return next(likely_reasons(self.model), "a size or a value of the example is a constant in the graph")

    def _place(self, graph: ModelGraph, trial: Trial) -> str:
        """Where a graph first differs from the model, in words."""
        try:
            calls, found = self._calls(trial), _calls_of(graph, trial)
            for path, inputs, output in calls:
                for given, gives in found.get(path, [])[:1]:
                    if not agree(inputs, given):
                        return f"in what {path.rpartition('.')[0] or type(self.model).__name__} hands to {path}"
                    if not agree(output, gives):
                        return f"in the output of {path}"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"at an unknown place, because a run that watches the layers fails ({error_text(error)})"
        return f"in what {type(self.model).__name__} does with the outputs of its layers"

    def _calls(self, trial: Trial) -> list[tuple[str, Any, Any]]:
        """The path, inputs and output of every call of a module, when the model runs on a batch."""
        calls: list[tuple[str, Any, Any]] = []
        own = plain_copy(self.model)
        for path, module in own.named_modules():
            note = partial(lambda path, module, args, output: calls.append((path, *_copied((args, output)))), path)
            module.register_forward_hook(note)
        _call(own, trial.batch, self.concrete, grad=trial.grad)
        return calls


def _calls_of(graph: ModelGraph, trial: Trial) -> dict[str, list[tuple[Any, Any]]]:
    """The inputs and outputs of the modules that a graph calls, when it runs on a batch, by their paths."""
    with evaluating(graph), attributes_restored(graph):
        recorder = _CallRecorder(graph)
        _run(recorder.run, placeholder_values(graph, trial.batch), {}, grad=trial.grad)
    return recorder.calls


class _CallRecorder(fx.Interpreter):
    """Runs a graph and keeps the inputs and outputs of its modules."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: dict[str, list[tuple[Any, Any]]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _copied(args)
        output = super().call_module(target, args, kwargs)
        self.calls.setdefault(str(target), []).append((given, _copied(output)))
        return output


def _copied(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


# -- running -----------------------------------------------------------------------------------------------------------


def first_run(own: nn.Module, example: Any, concrete: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two samples of the example, or else the whole, on which a model, a copy of our own, runs; and its output.

    Raises CaptureError, which names hooks and forwards that are set on instances, where it runs on neither.
    """
    try:
        return first_running(own, cuts(example), lambda batch: _call(own, batch, concrete))
    except CaptureError as error:
        raise CaptureError(f"{error}{hooks_in_words(own, list(hooks_of(own)))}") from error.__cause__


def _second_trial(
    own: nn.Module, batch: Any, other: Any, concrete: Mapping[str, Any], drawn: set[str] | None = None
) -> Iterator[Trial]:
    """Another batch, of another number of samples where the model takes one; none where it takes no other batch."""
    made = (varied_batch(batch, batch_length(batch) + 1), varied_batch(batch, batch_length(batch)))
    given = () if other is None else (trim(other, samples=3), other)
    tried = chain.from_iterable(_tried(own, batch, concrete, drawn) for batch in (*given, *made))
    yield from islice(tried, 1)


def _other_sizes(example: Any, batch: Any) -> Iterator[Any]:
    """The whole example and one sample of it, where these have another number of samples than its part, `batch`."""
    for other in (example, trim(example, samples=1)):
        if batch_length(other) != batch_length(batch) and (other is example or batch_length(other) == 1):
            yield other


def _tried(
    own: nn.Module,
    batch: Any,
    concrete: Mapping[str, Any],
    drawn: set[str] | None = None,
    grads: Sequence[bool] = (True, False),
) -> Iterator[Trial]:
    """A model's output on a batch, with gradients recorded if possible; nothing where it does not run."""
    for grad in grads:
        try:
            output = _call(own, batch, concrete, grad=grad, drawn=drawn)
        except Exception:  # noqa: BLE001, S112 - the caller's model takes no such batch, whatever it says
            continue
        yield Trial(batch, output, grad)
        return


def _call(
    own: nn.Module, batch: Any, concrete: Mapping[str, Any], *, grad: bool = False, drawn: set[str] | None = None
) -> Any:
    """The output of a model on a copy of a batch; the generators that it draws from are added to `drawn`."""
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, batch))
    if concrete:  # which may stand between the positional ones
        args, kwargs = (), dict(signature_of(own, concrete).bind(*args, **kwargs).arguments)
        for name, parameter in inspect.signature(own.forward).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                args = kwargs.pop(name, ())
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= kwargs.pop(name, {})
    return _run(own, args, {**kwargs, **concrete}, grad=grad, drawn=drawn)


def _run(function: Any, args: Any, kwargs: Any, *, grad: bool, drawn: set[str] | None = None) -> Any:
    """The result of a function, with all generators at one seed, and without its warnings.

    torch's fast path through transformer layers, which gives zeros where samples are padded, is not taken.
    """
    mha: Any = torch.backends.mha
    with seeded(_SEED), full_float32(), torch.set_grad_enabled(grad), warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
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


def _rows(batch: Any) -> str:
    count = batch_length(batch)
    return f"a batch of {count} sample{'s' if count != 1 else ''}"


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a forward may change, by name: buffers, numbers, and the lengths of containers."""
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        numbers = {name: value for name, value in plain_attributes(module).items() if isinstance(value, (int, float))}
        held = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        lengths = {name: f"{len(value)} entries" for name, value in held.items() if isinstance(value, _CONTAINERS)}
        state |= {f"{path}.{name}" if path else name: value for name, value in (numbers | lengths).items()}
    return state


def _say(what: str) -> None:
    warnings.warn(what, FxpruneWarning, stacklevel=5)
