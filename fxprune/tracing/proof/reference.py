"""The proof of a captured graph: it is run beside the caller's model, on the example and on another batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import batch_length, check_dense, copied, has_twins, leaves_of, numbers_in
from fxprune.caller.isolation import attributes_restored, evaluating, kept_buffers
from fxprune.caller.other_batches import in_other_layouts, varied_batch
from fxprune.caller.source_lines import warn
from fxprune.errors import CaptureError, error_text, is_out_of_memory
from fxprune.tracing.agreement import agree, check_comparable, difference, relative_error, same_value
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import Captured, ModelGraph, captured_of
from fxprune.tracing.proof.gradients import other_gradients
from fxprune.tracing.proof.lengths import fixed_lengths, numbers_beside
from fxprune.tracing.proof.likely_reasons import likely_reasons
from fxprune.tracing.proof.state import changes, numbers_of, state_of
from fxprune.tracing.proof.trials import (
    Original,
    Trial,
    begins_with,
    leaves_inputs_alike,
    other_sizes,
    run_graph,
    run_under_seed,
)
from fxprune.tracing.rounding import batch_in_double, floats_in, in_double, jumps

_CHEAP, _MANY = 1 << 32, 256  # parameters times numbers of a batch of that many samples, at most
_FURTHER = 10.0  # a graph that rounds in another way may be off by this times what rounding moves the model by
_SMALL = (4, 5, 8, 9, 16, 17, 6, 7, 10, 11, 12, 13, 14, 15)


class DisagreementError(CaptureError):
    """A graph gives other outputs than the model that it was captured from."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The outputs of the caller's model in eval mode, on the example and on other batches.

    The first trial is two samples of the example, or all; then come another batch, the whole example where the model
    gives other first rows for it, and one sample of it, each where the model takes it. `whole` is the example as it was
    given. `random` names the generators that a forward draws from, `changed` what its first run changes in buffers and
    numbers, and a second run on the same batch in all else, so not what each run fills anew, nor caches; `stateful`
    says that its output depends on earlier runs. `by_batch` and `by_length` are those of `Captured` of all graphs that
    were checked, and `asked` the trials that follow. `jumped` are the numbers of samples at which the outputs jump with
    rounding, so that a graph was compared in float64.
    """

    original: Original
    whole: Any
    trials: list[Trial]
    random: frozenset[str]
    changed: tuple[str, ...]
    stateful: bool
    by_batch: set[float] = field(default_factory=set)
    by_length: set[float] = field(default_factory=set)
    asked: dict[str, list[Trial]] = field(default_factory=dict)
    jumped: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, example: Any, other: Any, concrete: Mapping[str, Any]) -> Reference:
        """Run copies of `model`; `other` is another batch, or None where one is to be made of the example.

        Raises CaptureError where the model does not run on the example.
        """
        original, drawn = Original(model, concrete), set[str]()
        own, outside = original.model, original.outside
        before = numbers_of(own)
        with original.restored():
            held_before = state_of(own, outside.values())
            batch, output = original.first_run(example)
            check_dense(output, f"the output of {original.name}", CaptureError, strided=True, meta=True)
            check_comparable(output)
            after, held = numbers_of(own), state_of(own, outside.values())
            again = original.tried(batch, grads=(False,))
            held_again = state_of(own, outside.values())
            later = original.second_trial(batch, other, drawn)
        untouched = held_before.keys() == held.keys() and not any(changes(held_before, held_again))
        numbers = (name for name, value in after.items() if not same_value(value, before.get(name)))
        changed = tuple(dict.fromkeys((*numbers, *changes(held, held_again))))
        sized: list[Trial] = []
        for other_size in other_sizes(example, batch):
            found = original.tried_afresh(other_size, grads=(False,))
            sized += [trial for trial in found if not begins_with(trial.output, output)]
        second = later
        if changed or not untouched:
            with original.restored():
                second = original.second_trial(batch, other)
        trials = [Trial(batch, output, grad=False, left=next((trial.left for trial in again), None)), *second, *sized]
        outputs = ([trial.output for trial in run] for run in ([*again, *later], trials[: 1 + len(later)]))
        stateful = not agree(*outputs)
        if stateful and not changed:
            changed = tuple(changes(held_before, held))
        return cls(original, example, trials, frozenset(drawn), changed, stateful)

    @property
    def example(self) -> Any:
        """The part of the example that the model runs on."""
        return self.trials[0].batch

    def warn(self, graph: ModelGraph) -> None:
        """Warn where a graph differs from its model: in random numbers, and in what a forward changes."""
        name = self.original.name
        written = next((trial for trial in self.trials if trial.left is not None), None)
        if written and not leaves_inputs_alike(graph, written):
            warn(
                f"the forward of {name} writes into its input, and its graph does not: return the new value, too, "
                "where the caller goes on with it"
            )
        if "torch" in self.random:
            warn(
                f"{name} draws random numbers in eval mode: its graph draws them, too, and was compared under one seed"
            )
        if others := " and ".join(sorted(self.random - {"torch"})):
            warn(f"{name} draws random numbers from {others} in eval mode: its graph holds those of one run")
        if self.changed or self.stateful:
            warn(
                f"the forward of {name} changes {self._changed_in_words()}: the graph begins with the buffers that the "
                "model has now, and holds all else at the values of the first call"
            )

    def _changed_in_words(self) -> str:
        return ", ".join(sorted(self.changed)[:4]) or "something that its later outputs depend on"

    def warn_of_lengths(self, graph: ModelGraph) -> None:
        """Warn of lengths of the inputs at which the graph is fixed, though the model takes others.

        Nothing is tried where a forward changes something, as was told: the output may depend on earlier runs.
        """
        if self.changed or self.stateful:
            return
        name, leaves = self.original.name, leaves_of(self.example)
        takes_one = any(batch_length(trial.batch) == 1 for trial in self.trials)
        example = varied_batch(self.example, 1) if takes_one else self.example
        for (number, axis), why in fixed_lengths(*self._exact(graph, example), self.by_length):
            shape = tuple(leaves[number].shape)
            warn(
                f"the graph of {name} holds for {shape[axis]} entries along axis {axis} of its input of shape {shape}: "
                f"{why}. Give an example of the length that the model is for"
            )

    def warn_of_gradients(self, graph: ModelGraph) -> None:
        """Warn of parameters and inputs whose gradients are others in the graph than in the model."""
        smallest = min((trial.batch for trial in self.trials), key=numbers_in)
        if names := other_gradients(*self._exact(graph, smallest)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warn(
                f"the graph gives the outputs of {self.original.name}, but trains otherwise: it has other "
                f"gradients of {', '.join(names[:3])}{more}. Likely, the forward has blocks of torch.no_grad, or "
                "operations with a backward of their own (torch.autograd.Function, register_hook), which a graph does "
                "not hold; scores use the gradients of the graph"
            )

    def check(self, graph: ModelGraph) -> None:
        """Raise DisagreementError where a graph gives other outputs than the model."""
        for trial in (*self.trials, *self._asked_for(captured_of(graph))):
            rows = _rows(trial.batch)
            try:
                found = run_graph(graph, trial)
            except Exception as error:
                raise DisagreementError(
                    f"its graph fails on {rows}, on which the model runs ({error_text(error)})"
                ) from error
            if not agree(trial.output, found) and not self._is_rounding(graph, trial, found):
                raise DisagreementError(
                    f"its graph gives other outputs than the model on {rows} ({difference(trial.output, found)}), "
                    f"first {self._place(graph, trial)}"
                )

    def _is_rounding(self, graph: ModelGraph, trial: Trial, found: Any) -> bool:
        """Whether a graph differs by no more than the model does when it rounds in another way, and not in float64."""
        original = self.original

        def call(model: nn.Module, batch: Any) -> Any:
            with attributes_restored(model), kept_buffers(model):
                return run_under_seed(model, *original.arguments(copied(batch)), grad=trial.grad)

        error = relative_error(floats_in(trial.output), floats_in(found))
        with original.restored():
            if not (moved := jumps(call, original.model, trial.batch)) or not error <= _FURTHER * moved:
                return False
            batch = batch_in_double(trial.batch)
            try:
                wanted = call(in_double(original.model), batch)
                found = run_graph(in_double(graph), replace(trial, batch=batch))
            except Exception as failed:
                if is_out_of_memory(failed):
                    raise
                return False
        if agree(wanted, found):
            self.jumped.add(batch_length(trial.batch))
            return True
        return False

    def _exact(self, graph: ModelGraph, batch: Any) -> tuple[Original, ModelGraph, Any]:
        """The model, a graph and a batch, in float64 where outputs jump with rounding."""
        if not self.jumped:
            return self.original, graph, batch
        wide = Original(in_double(self.original.model), self.original.concrete)
        return wide, in_double(graph), batch_in_double(batch)

    def _asked_for(self, captured: Captured) -> list[Trial]:
        """Trials of what a forward decided by while it was traced, by any method: sizes, the layout in memory."""
        if captured.by_layout and "layout" not in self.asked:
            batches = in_other_layouts(self.example)
            self.asked["layout"] = [trial for batch in batches for trial in self.original.tried_afresh(batch)]
        self.by_length.update(captured.by_length)
        if not captured.by_batch <= self.by_batch:
            self.by_batch.update(captured.by_batch)
            self.asked["samples"] = list(self._other_numbers_of_samples())
        return [trial for trials in self.asked.values() for trial in trials]

    def _other_numbers_of_samples(self) -> Iterator[Trial]:
        """Trials of other numbers of samples: beside the numbers that a forward compares with, and small ones."""
        whole, part = batch_length(self.whole), batch_length(self.example)
        known = {batch_length(trial.batch) for trial in self.trials}
        beside = numbers_beside(part, self.by_batch)
        work = numbers_in(self.whole) * sum(parameter.numel() for parameter in self.original.model.parameters())
        affordable = min(_MANY, whole * _CHEAP // max(1, work))
        for numbers, largest, most in (
            (sorted(beside), max(4 * whole, affordable), math.inf),
            ((whole + 1, *_SMALL), math.inf, max(whole + 1, affordable // 4)),
        ):
            tried_here = 0
            for samples in (number for number in numbers if 1 <= number <= largest and number not in known):
                if samples + tried_here <= most:
                    tried_here += samples
                    known.add(samples)
                    yield from self.original.tried_afresh(varied_batch(self.whole, samples))
        if affordable == _MANY < max(beside):
            warn(
                f"{self.original.name} decides by sizes, and its graph goes the way of {part} samples: it was "
                f"not compared with the model on {max(beside)}"
            )

    def reason(self) -> str:
        """The likely reason why the graphs differ, in words."""
        if self.random:
            return "it draws random numbers that a graph does not hold: draw with torch, from its own generator"
        if has_twins(self.whole):
            return "it asks whether two of its inputs are the same tensor: give the decision an argument of its own"
        if self.stateful:
            return f"its outputs depend on earlier calls: the forward changes {self._changed_in_words()}"
        first = self.trials[0]
        for trial in self.original.tried_afresh(first.batch, grads=(True,)):
            if not agree(first.output, trial.output):
                return "it decides by whether gradients are recorded: give the decision an argument of its own"
        return next(likely_reasons(self.original.model), "a size or a value of the example is a constant in the graph")

    def _place(self, graph: ModelGraph, trial: Trial) -> str:
        """Where a graph first differs from the model, in words."""
        try:
            calls, found = self._calls(trial), _calls_of(graph, trial)
            for path, inputs, output in calls:
                for given, gives in found.get(path, [])[:1]:
                    if not agree(inputs, given):
                        return f"in what {path.rpartition('.')[0] or self.original.name} hands to {path}"
                    if not agree(output, gives):
                        return f"in the output of {path}"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"at an unknown place, because a run that watches the layers fails ({error_text(error)})"
        return f"in what {self.original.name} does with the outputs of its layers"

    def _calls(self, trial: Trial) -> list[tuple[str, Any, Any]]:
        """The path, inputs and output of every call of a module, when the model runs on a batch."""
        calls: list[tuple[str, Any, Any]] = []
        with self.original.restored():
            for path, module in self.original.model.named_modules():
                note = partial(lambda path, module, args, output: calls.append((path, *_copied((args, output)))), path)
                module.register_forward_hook(note)
            self.original.call(copied(trial.batch), grad=trial.grad)
        return calls


def _calls_of(graph: ModelGraph, trial: Trial) -> dict[str, list[tuple[Any, Any]]]:
    """The inputs and outputs of the modules that a graph calls, when it runs on a batch, by their paths."""
    with evaluating(graph), attributes_restored(graph):
        recorder = _CallRecorder(graph)
        run_under_seed(recorder.run, placeholder_values(graph, trial.batch), {}, grad=trial.grad)
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


def _rows(batch: Any) -> str:
    count = batch_length(batch)
    return f"a batch of {count} sample{'s' if count != 1 else ''}"
