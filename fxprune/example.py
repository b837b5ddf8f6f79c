"""What the forward of a model was given: example batches, and their description in names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError, PlanError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and device of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class PackedSpec(TensorSpec):
    """Shape, dtype and device of the data of a packed sequence: (steps of all sequences, channels)."""


def spec_of(value: Any) -> Any:
    """`value` with a `TensorSpec` in the place of every tensor, and a `PackedSpec` in that of packed sequences."""
    return pytree.tree_map(_leaf_spec, opened(value), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def _leaf_spec(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSpec(tuple(value.data.shape), value.data.dtype, value.data.device)
    return TensorSpec(tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


def opened(value: Any) -> Any:
    """`value`, where it is a dataclass of the user's, as a dict of those of its fields that are given.

    >>> opened(TensorSpec((2,), torch.float32, torch.device("cpu")))["shape"]
    (2,)
    """
    if not is_dataclass(value) or isinstance(value, type):
        return value
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: entry for name, entry in given.items() if entry is not None}


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that `example` stands for: a tensor, a tuple or list, or a mapping.

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def trim(example: Any, *, samples: int) -> Any:
    """The first `samples` rows of every tensor of an example batch."""
    return pytree.tree_map_only(Tensor, lambda t: t[:samples] if t.ndim else t, example)


def to_device(values: Any, device: torch.device) -> Any:
    """Every tensor in `values`, on `device`; but beside others on an accelerator, those on the CPU stay there.

    Whoever moved those has left these for a forward that wants them there, as one does that packs sequences by lengths.
    """
    devices = {leaf.device.type for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
    placed = bool(devices - {"cpu", "meta"})

    def moved(tensor: Tensor) -> Tensor:
        stays = placed and tensor.device.type == "cpu"
        return (tensor.clone() if tensor.is_inference() else tensor).to(tensor.device if stays else device)

    return pytree.tree_map_only(Tensor, moved, values)


def to_json(example: Any) -> Any:
    """A JSON description of an example, from which `from_json` builds another of the same shapes.

    >>> to_json((torch.zeros(2, 3), {"flag": None}))
    [{'tensor': [2, 3], 'dtype': 'float32'}, {'flag': None}]
    """
    if isinstance(example, Tensor):
        described = {"tensor": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
        counts = example.dtype in (torch.int32, torch.int64) and example.numel()
        return described | ({"largest": int(example.max())} if counts else {})
    if isinstance(example, Mapping):
        return {str(name): to_json(value) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return [to_json(value) for value in example]
    if example is None or isinstance(example, (bool, int, float, str)):
        return example
    raise CaptureError(
        f"the example holds a {type(example).__name__}, which a plan cannot describe: "
        "give tensors, numbers, strings, None, and tuples, lists or dicts of these"
    )


def from_json(description: Any, *, device: torch.device | str = "cpu") -> Any:
    """An example of the described shapes and dtypes: seeded normal numbers for floats, the largest of integers."""
    if isinstance(description, Mapping) and "tensor" in description:
        dtype = getattr(torch, str(description.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise PlanError(
                f"the plan's example names the dtype {description.get('dtype')!r}, which torch does not have"
            )
        if not dtype.is_floating_point:
            return torch.full(description["tensor"], description.get("largest", 0), dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(description["tensor"], generator=generator, dtype=torch.float32).to(device, dtype)
    if isinstance(description, Mapping):
        return {name: from_json(value, device=device) for name, value in description.items()}
    if isinstance(description, list):
        return tuple(from_json(value, device=device) for value in description)
    return description
