"""What files say of examples and settings, checked before anything is made of it; and what is made of it then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from fxprune.capture import ModelGraph, capture_as, is_captured
from fxprune.errors import PlanError, first_line, is_of_memory
from fxprune.example import from_json
from fxprune.isolation import device_of
from fxprune.numberless import home_of
from fxprune.records import restored

LARGEST_EXAMPLE = 1 << 30  # bytes of the example batch that a file describes
FREE = 32 << 20  # bytes that the example of any model may have, beside as many as the model itself has
DEEPEST = 50
SETTINGS: dict[str, Any] = {
    "method": str, "leaves": tuple[str, ...], "concrete_args": Mapping[str, Any], "submodule": str,
    "inexact": bool, "head_dim": bool, "decisions": tuple[bool | int | float, ...],
}  # fmt: skip


def check_settings(settings: Any) -> None:
    """Raise TypeError where settings are no mapping, or one has another type than it should."""
    restored(Mapping[str, Any], settings, "settings")  # type: ignore[type-abstract]
    for name, value in settings.items():
        restored(SETTINGS.get(name, Any), value, f"settings.{name}")


def check_example(description: Any) -> None:
    """Raise TypeError or ValueError where an example is not described as `to_json` does, or is very large.

    >>> check_example({"tensor": [1 << 20, 1 << 20], "dtype": "float32"})
    Traceback (most recent call last):
    ValueError: it names an example batch of 4,398,046,511,104 bytes, more than 1,073,741,824: score smaller batches
    """
    size = _bytes(description, 0)
    if size > LARGEST_EXAMPLE:
        raise ValueError(
            f"it names an example batch of {size:,} bytes, more than {LARGEST_EXAMPLE:,}: score smaller batches"
        )


def captured(settings: Mapping[str, Any], model: nn.Module, description: Any) -> ModelGraph:
    """The graph of a model, captured as `settings` say on an example of the described shapes; a graph as it is."""
    if is_captured(model):
        return cast("ModelGraph", model)
    return capture_as(settings, model, example_for(model, description), made=True)


def example_for(model: nn.Module, description: Any) -> Any:
    """An example of the described shapes for a model, where it can be.

    Raises PlanError where it is out of proportion to the model, or of a dtype that cannot be made.
    """
    size, limit = (
        _bytes(description, 0),
        FREE + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    )
    if size > limit:
        raise PlanError(
            f"the plan's example has {size:,} bytes, more than the {limit:,} that are made for a "
            f"{type(model).__name__}: score smaller samples, or capture the model on an example of your own and give "
            "the graph in its place"
        )
    try:
        return from_json(description, device=home_of(device_of(model)))
    except (RuntimeError, TypeError) as error:
        if is_of_memory(error):
            raise
        raise PlanError(f"the plan's example cannot be made ({first_line(error)}): score the model again") from error


def _bytes(description: Any, depth: int) -> int:
    """The bytes that the tensors of a description have in all."""
    if depth > DEEPEST:
        raise ValueError(f"the example is nested more than {DEEPEST} deep")
    if isinstance(description, Mapping) and "tensor" in description:
        return _tensor(description)
    if isinstance(description, (Mapping, list)):
        inner = description.values() if isinstance(description, Mapping) else description
        return sum(_bytes(entry, depth + 1) for entry in inner)
    return 0


def _tensor(description: Mapping[str, Any]) -> int:
    shape, dtype, largest = description["tensor"], description.get("dtype"), description.get("largest", 0)
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape) or len(shape) > DEEPEST:
        raise ValueError(f"the example names the shape {shape!r}, which is no list of sizes")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"the example names the dtype {dtype!r}, which torch does not have")
    if type(largest) is not int or not -(2**63) <= largest < 2**63:
        raise ValueError(f"the example names {largest!r} for the largest of its numbers")
    _check_row(description.get("row"), shape)
    kind: torch.dtype = getattr(torch, dtype)
    return math.prod(shape) * kind.itemsize


def _check_row(row: Any, shape: list[int]) -> None:
    """Raise ValueError where the row that stands for all of a tensor is not one of its shape."""
    if row is None:
        return
    numbers, length = isinstance(row, list) and all(type(n) in (int, float) for n in row), math.prod(shape[1:])
    if not numbers or len(row) != length:
        raise ValueError(f"the example names a row of a tensor of shape {shape} that is not {length} numbers")
