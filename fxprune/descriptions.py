"""What files say of examples and settings, checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fxprune.records import restored

LARGEST_EXAMPLE = 1 << 28  # entries of the example batch that a file describes
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
    ValueError: it names an example batch of 1,099,511,627,776 numbers, more than 268,435,456: score smaller batches
    """
    entries = _entries(description, 0)
    if entries > LARGEST_EXAMPLE:
        raise ValueError(
            f"it names an example batch of {entries:,} numbers, more than {LARGEST_EXAMPLE:,}: score smaller batches"
        )


def _entries(description: Any, depth: int) -> int:
    """The numbers that the tensors of a description have in all."""
    if depth > DEEPEST:
        raise ValueError(f"the example is nested more than {DEEPEST} deep")
    if isinstance(description, Mapping) and "tensor" in description:
        return _tensor(description)
    if isinstance(description, (Mapping, list)):
        inner = description.values() if isinstance(description, Mapping) else description
        return sum(_entries(entry, depth + 1) for entry in inner)
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
    return math.prod(shape)


def _check_row(row: Any, shape: list[int]) -> None:
    """Raise ValueError where the row that stands for all of a tensor is not one of its shape."""
    if row is None:
        return
    numbers, length = isinstance(row, list) and all(type(n) in (int, float) for n in row), math.prod(shape[1:])
    if not numbers or len(row) != length:
        raise ValueError(f"the example names a row of a tensor of shape {shape} that is not {length} numbers")
