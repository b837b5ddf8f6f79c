"""The proof of a rewritten model: its labels, and its numbers against the original with the removed units zeroed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.capture import ModelGraph, capture_as, placeholder_values
from fxprune.coupling import Coupling
from fxprune.draws import Expected
from fxprune.errors import CalibrationError, FxpruneError, VerificationError, blaming, stage
from fxprune.example import as_call, opened, to_device
from fxprune.isolation import device_of, evaluating, precise, undisturbed
from fxprune.numberless import need_numbers
from fxprune.objective import spoiled
from fxprune.oracle import oracle
from fxprune.plan import Plan, coupling_of, kept_units
from fxprune.rewrite import MismatchError, check_labels
from fxprune.submodule import part_of

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify(model: nn.Module, plan: Plan, small: nn.Module, example: Any, *, tolerance: float | None = None) -> float:
    """Prove that `small` is `model` with the units that `plan` removes zeroed wherever they are read.

    First the labels that stay are run through `small`; at every node they must be the original's, narrowed. Then both
    run in eval mode on `example`, the original with a mask on every edge that reads a removed unit. Where they differ
    and draw random numbers (`torch.randn_like`, say), they are compared once more with constants in their place.

    Args:
        example: one batch of inputs; where the plan is for a part of the model, inputs of that part.
        tolerance: of the returned error; by default 1e-9 in float64, 1e-4 in float32, 2e-2 in float16, 0.1 in bfloat16.

    Returns:
        The largest absolute difference of the outputs, divided by the largest finite absolute output of the original.
        Infinities that both hold, such as those of a mask, are no difference.

    Raises:
        VerificationError: the labels disagree, or the error is above the tolerance.
        CalibrationError: a model fails on the example, or that is not finite.
    """
    need_numbers(model, "verify")
    need_numbers(small, "verify")
    with stage("verifying"), undisturbed(), precise(), torch.no_grad():
        model, small = part_of(model, plan.submodule), part_of(small, plan.submodule)
        graph = capture_as(plan.settings, model, example)
        coupling = coupling_of(graph, plan)
        keep = kept_units(plan, coupling)
        if isinstance(small, ModelGraph):
            _check_labels(small, coupling, keep, graph)
        example = to_device(pytree.tree_map_only(Tensor, Tensor.detach, example), device_of(graph))
        with blaming("the original", "the example"):
            if (found := spoiled(graph, placeholder_values(graph, example))) is not None:
                raise CalibrationError(f"{found} on the example: give one of finite numbers")
            masked = oracle(graph, coupling, keep)
        try:
            return _difference(masked, small, example, tolerance)
        except VerificationError:
            with Expected() as expected:
                error = _difference(masked, small, example, tolerance)
            if not expected.drawn:
                raise
            return error


def _difference(masked: fx.GraphModule, small: nn.Module, example: Any, tolerance: float | None) -> float:
    """The relative difference of what both give. Raises VerificationError where it is too large."""
    with blaming("the original", "the example"):
        wanted = _output(masked, example)
    with blaming("the rewritten model", "the example"):
        found = _output(small, example)
    return _compared(wanted, found, tolerance)


def _check_labels(small: ModelGraph, coupling: Coupling, keep: NDArray[np.bool_], graph: ModelGraph) -> None:
    try:
        check_labels(small, coupling, keep, graph)
    except MismatchError as error:
        raise VerificationError(
            f"{error}: the rewritten graph does not do what the plan says; please report the model"
        ) from error


def _output(model: Any, example: Any) -> Any:
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*placeholder_values(model, example))


def _compared(wanted: Any, found: Any, tolerance: float | None) -> float:
    """The relative difference of two nested outputs. Raises VerificationError where it is too large."""
    expected, got = _tensors(wanted), _tensors(found)
    if [t.shape for t in expected] != [t.shape for t in got]:
        raise VerificationError(
            f"the rewritten model gives shapes {[tuple(t.shape) for t in got]}, "
            f"the original {[tuple(t.shape) for t in expected]}"
        )
    if not expected:
        raise FxpruneError("the model's output holds no tensor of floats: there is nothing to compare")
    largest = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.isnan().any():
            raise VerificationError(
                "the zero-masked original gives NaN on the example, and there is nothing to compare: "
                "exclude= the layers that it divides by or takes logarithms of, or remove fewer units"
            )
        error = _apart(a, b)
        limit = TOLERANCES[a.dtype] if tolerance is None else tolerance
        if not error <= limit:
            raise VerificationError(
                f"the rewritten model differs from the zero-masked original by {error:.3g} of the output's scale, "
                f"more than {limit:.3g}"
            )
        largest = max(largest, error)
    return largest


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating tensors that a model, or a graph, gives in eval mode on a batch as its forward takes it."""
    if isinstance(model, ModelGraph):
        with torch.no_grad():
            return _tensors(_output(model, example))
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, example))
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _tensors(model(*args, **kwargs))


def relative_error(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, in shares of the largest entry; infinite for other shapes."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return math.inf
    errors = [_apart(a, b.to(a)) for a, b in zip(wanted, found, strict=True)]
    return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


def _apart(wanted: Tensor, found: Tensor) -> float:
    """The largest difference in shares of the largest finite entry; infinities that both hold are no difference."""
    if not wanted.numel():
        return 0.0
    scale = wanted.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float(torch.where(wanted == found, 0.0, (wanted - found).abs()).max() / scale)


def _tensors(values: Any) -> list[Tensor]:
    """The floating tensors of a nested output."""
    return [t for t in pytree.tree_leaves(opened(values)) if isinstance(t, Tensor) and t.is_floating_point()]
