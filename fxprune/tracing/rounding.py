"""Models whose outputs jump with rounding, as where a forward takes the largest of nearly equal scores.

Two such models that are equal can be told so in float64 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.caller.example import as_fields, each_tensor
from fxprune.caller.isolation import applied, isolated_copy
from fxprune.errors import is_out_of_memory
from fxprune.tracing.agreement import TOLERANCES, relative_error

Model = TypeVar("Model", bound=nn.Module)
Call = Callable[[Any, Any], Any]  # the output of a model on a batch

_SEEDS, _BITS = 5, 8.0  # moves by so many times the precision, about what sums in another order are off by


def jumps(call: Call, model: nn.Module, batch: Any) -> float:
    """How far the outputs of a float32 model move with the last bits of its weights and inputs, in shares of theirs.

    0 for what is rounding itself, and for models that also compute in fewer bits, as under autocast, or that fail.
    """
    try:
        with _Dtypes() as seen:
            wanted = floats_in(call(model, batch))
        held = {t.dtype for t in (*wanted, *model.parameters())}
        if held != {torch.float32} or not seen.dtypes <= {torch.float32, torch.float64}:
            return 0.0
        moved = max(relative_error(wanted, floats_in(call(*_nudged(model, batch, seed)))) for seed in range(_SEEDS))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return 0.0
    return moved if moved > TOLERANCES[torch.float32] else 0.0


def _nudged(model: nn.Module, batch: Any, seed: int) -> tuple[nn.Module, Any]:
    """A copy of a model and of a batch whose floats are moved up or down by their last bits."""
    generator, own = torch.Generator().manual_seed(seed), isolated_copy(model)

    def nudged(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + _BITS * torch.finfo(tensor.dtype).eps * signs)

    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(nudged(parameter))
    return own, each_tensor(nudged, batch)


class _Dtypes(TorchDispatchMode):
    """Collects the floating dtypes of all results, `dtypes`."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operation."""
        del types
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in floats_in(result)}
        return result


def in_double(model: Model) -> Model:
    """A copy of a model in float64."""
    return applied(isolated_copy(model), "double")  # type: ignore[return-value]


def error_in_double(call: Call, wanted: nn.Module, found: nn.Module, batch: Any) -> float:
    """The error of a model in float64, in shares of the wanted outputs; infinite where one does not run there."""
    try:
        outputs = [floats_in(call(in_double(model), batch_in_double(batch))) for model in (wanted, found)]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return math.inf
    return relative_error(*outputs)


def batch_in_double(batch: Any) -> Any:
    """A batch with float64 in place of other floats."""
    return each_tensor(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def floats_in(values: Any) -> list[Tensor]:
    """The floating tensors of a nested output, without their history."""
    return [
        t.detach() for t in pytree.tree_leaves(as_fields(values)) if isinstance(t, Tensor) and t.is_floating_point()
    ]
