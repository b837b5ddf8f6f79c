"""The proof of a rewritten model: its labels, and its numbers against the original with the removed units zeroed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.example import as_call, batch_length, to_device
from fxprune.caller.isolation import device_of, evaluating, full_float32, stateless, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.other_batches import varied_batch
from fxprune.errors import CalibrationError, FxpruneError, VerificationError, blaming, error_text, stage
from fxprune.planning.plan import Plan, coupling_of, kept_units
from fxprune.planning.planned import Planned
from fxprune.rewriting.expected_draws import Expected
from fxprune.rewriting.oracle import oracle
from fxprune.rewriting.remaining import MismatchError
from fxprune.rewriting.rewrite import check_labels
from fxprune.tracing.agreement import TOLERANCES, apart
from fxprune.tracing.capture import capture_as
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.finite import spoiled
from fxprune.tracing.graph import RECORD, ModelGraph, example_of, refitted
from fxprune.tracing.part import part_of
from fxprune.tracing.rounding import batch_in_double, floats_in, in_double, jumps

_LOG = logging.getLogger(__name__)


def verify(model: nn.Module, plan: Plan, small: nn.Module, example: Any, *, tolerance: float | None = None) -> float:
    """Prove that `small` is `model` with the units that `plan` removes zeroed wherever they are read.

    First the kept labels are run through `small`; at every node they must be the original's, narrowed. Then both run in
    eval mode, the original with a mask on every edge that reads a removed unit: on `example`, and on a batch of one
    more sample with other values where the original runs on it. Models that draw random numbers (`torch.randn_like`,
    say) and differ are compared again with constants in their place, and models in float32 whose outputs jump with
    rounding (a top-k among nearly equal scores) in float64. Where the plan removes nothing, `small` is also
    compared with `model` itself.

    Args:
        example: one batch of inputs; where the plan is for a part of the model, inputs of that part.
        tolerance: of the returned error; by default 1e-9 in float64, 1e-4 in float32, 2e-2 in float16, 0.1 in bfloat16.

    Returns:
        The largest absolute difference of the outputs, divided by the largest finite absolute output of the original.
        Infinities in the same places of both are no difference, and up to two fill values (such as the -1e9 of a mask)
        that equal in both and exceed all others 100 times set no scale.

    Raises:
        VerificationError: the labels disagree, or the error is above the tolerance, as it is for a model that was
            compensated or trained after the removal.
        CalibrationError: a model fails on the example, or the example is not finite.
    """
    check(verify, locals())
    need_numbers(model, "verify")
    need_numbers(small, "verify")
    model, small = part_of(model, plan.submodule), part_of(small, plan.submodule)
    with stage("verifying"), undisturbed():
        graph = capture_as(plan.settings, model, example)
        coupling = coupling_of(graph, plan)
        planned = Planned(graph, coupling, kept_units(plan, coupling))
    try:
        return error_of(plan, planned, small, example, model=model, tolerance=tolerance)
    except VerificationError as error:
        own = getattr(small.meta.get(RECORD), "plan", None) if isinstance(small, ModelGraph) else None
        if own is not None and own.keep != plan.keep:
            raise VerificationError(
                f'{type(small).__name__} was not made by the plan given, but by small.meta["fxprune"].plan: pass that'
            ) from error
        if not (changed := refitted(small)) or isinstance(error.__cause__, MismatchError):
            raise
        raise VerificationError(
            f"the weights of {type(small).__name__} were changed after the removal, by {changed}, so it cannot equal "
            f"the masked original ({error}): compare plain removal, fxprune.verify(model, plan, "
            'fxprune.apply(model, plan), example), or compress with compensate="none"; the error that compress found '
            "before it changed the weights is fxprune.report(small).error"
        ) from error


def error_of(
    plan: Plan,
    planned: Planned,
    small: nn.Module,
    example: Any = None,
    *,
    model: nn.Module | None = None,
    tolerance: float | None = None,
) -> float:
    """`verify` for the part that a plan is for, in the terms of its graph, on the graph's own example by default.

    Where the plan removes nothing, `small` is also compared with `model`, which the graph was captured from.
    """
    graph, coupling, keep = planned
    example = example_of(graph) if example is None else example
    with stage("verifying"), undisturbed(), full_float32(), torch.no_grad():
        if isinstance(small, ModelGraph):
            try:
                check_labels(small, coupling, keep, graph)
            except MismatchError as mismatch:
                raise VerificationError(
                    f"{mismatch}: the rewritten graph does not match the plan; please report the model"
                ) from mismatch
        example = to_device(pytree.tree_map_only(Tensor, Tensor.detach, example), device_of(graph))
        with blaming("the original", "the example"):
            if (found := spoiled(graph, placeholder_values(graph, example))) is not None:
                raise CalibrationError(f"{found} on the example: give one of finite numbers")
            masked = oracle(graph, coupling, keep)
        called = partial(_called, concrete=plan.settings.get("concrete_args") or {})
        call = _output if isinstance(small, ModelGraph) else called
        run = partial(call, small)
        try:
            error = _Proof(partial(_output, masked), partial(_output, graph), run, tolerance).on(example)
        except VerificationError as failure:
            if tolerance is not None or not jumps(_output, masked, example):
                raise
            try:
                wide = [in_double(m) for m in (masked, graph, small)]
                proof = _Proof(partial(_output, wide[0]), partial(_output, wide[1]), partial(call, wide[2]), None)
                error = proof.on(batch_in_double(example))
            except FxpruneError:
                raise failure from None
        if model is not None and model is not graph and keep.all():
            whole = partial(called, model)
            error = max(error, _Proof(whole, whole, run, tolerance, "the model that it was made from").on(example))
        return error


Run = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Proof:
    """Calls that give the wanted outputs, the original's and those of the rewritten model, to be compared."""

    wanted: Run
    original: Run
    found: Run
    tolerance: float | None
    what: str = "the zero-masked original"

    def on(self, example: Any) -> float:
        """The larger error on an example and on a varied batch. Raises VerificationError where one is too large."""
        try:
            return self._errors(example)
        except VerificationError:
            with Expected() as expected:
                error = self._errors(example)
            if not expected.drawn:
                raise
            return error

    def _errors(self, example: Any) -> float:
        with blaming("the original", "the example"):
            wanted = self.wanted(example)
        with blaming("the rewritten model", "the example"):
            found = self.found(example)
        error = _compared(wanted, found, self.tolerance, self.what, "the example")
        samples = batch_length(example)
        where = f"{samples + 1} samples like the {samples} of the example"
        return max(error, self._error_on(varied_batch(example, samples + 1), where)) if samples else error

    def _error_on(self, batch: Any, where: str) -> float:
        """The error on another batch; 0 where the original does not run on it, or gives NaN."""
        try:
            with blaming("the original", where):
                wanted = self.wanted(batch)
        except CalibrationError as error:
            if self._runs_on(batch):
                raise
            _LOG.debug("the proof is that on the example alone: %s", error)
            return 0.0
        if any(bool(t.isnan().any()) for t in floats_in(wanted)):
            return 0.0
        try:
            found = self.found(batch)
        except Exception as error:
            raise VerificationError(
                f"the rewritten model fails on {where}, on which the original runs ({error_text(error)})"
            ) from error
        return _compared(wanted, found, self.tolerance, self.what, where)

    def _runs_on(self, batch: Any) -> bool:
        try:
            self.original(batch)
        except Exception:  # noqa: BLE001 - any error of the user's model on another number of samples
            return False
        return True


def _output(model: nn.Module, example: Any) -> Any:
    """The output of a graph in eval mode; its buffers, and those of modules that it shares, are unchanged."""
    with _running(model):
        return model(*placeholder_values(model, example))  # type: ignore[arg-type]


def _called(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> Any:
    """The output of a model in eval mode, called as its forward is; the model is unchanged."""
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, example))
    with _running(model):
        return model(*args, **kwargs, **concrete)


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, with the same random numbers each time and without traces."""
    with evaluating(model), stateless(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _compared(wanted: Any, found: Any, tolerance: float | None, what: str, where: str) -> float:
    """The relative difference of two nested outputs. Raises VerificationError where it is too large."""
    expected, got = floats_in(wanted), floats_in(found)
    if [t.shape for t in expected] != [t.shape for t in got]:
        raise VerificationError(
            f"on {where}, the rewritten model gives shapes {[tuple(t.shape) for t in got]}, "
            f"the original {[tuple(t.shape) for t in expected]}"
        )
    if not expected:
        raise FxpruneError("the model's output holds no tensor of floats: there is nothing to compare")
    largest = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.isnan().any():
            raise VerificationError(
                f"{what} gives NaN on {where}, and there is nothing to compare: "
                "exclude= the layers that it divides by or takes logarithms of, or remove fewer units"
            )
        error = apart(a, b)
        limit = TOLERANCES[a.dtype] if tolerance is None else tolerance
        if not error <= limit:
            raise VerificationError(
                f"the rewritten model differs from {what} by {error:.3g} of the output's scale, more than {limit:.3g}, "
                f"on {where}"
            )
        largest = max(largest, error)
    return largest


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating tensors in the output of a model or graph in eval mode, on a batch as its forward takes it."""
    return floats_in(_output(model, example) if isinstance(model, ModelGraph) else _called(model, example, {}))
