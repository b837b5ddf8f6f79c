"""Example batches: specs, smaller and varied batches, and descriptions in JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxprune.caller.tensors import dtype_name
from fxprune.errors import CaptureError, FxpruneError, a_kind

LARGEST_EXAMPLE = 1 << 30  # bytes of the example batch that a file describes
DEEPEST = 50  # levels of nesting, and axes of a tensor
LONGEST_ROW = 256  # numbers of a row that a plan keeps


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
    """`value` with each tensor replaced by a `TensorSpec`, and each packed sequence by a `PackedSpec`."""

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return PackedSpec(tuple(leaf.data.shape), leaf.data.dtype, leaf.data.device)
        return TensorSpec(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf

    return spec(value) if isinstance(value, Tensor) else pytree.tree_map(spec, as_fields(value), is_leaf=is_packed)


def is_packed(value: Any) -> bool:
    """Whether a value is a packed sequence, which stays whole in nested values."""
    return isinstance(value, PackedSequence)


def as_fields(value: Any) -> Any:
    """`value` with each dataclass replaced by a dict of its fields that are not None.

    Mappings, lists and tuples that pytree does not open are replaced by plain ones.

    >>> as_fields([TensorSpec((2,), torch.float32, torch.device("cpu"))])[0]["shape"]
    (2,)
    """
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: as_fields(entry) for name, entry in given.items() if entry is not None}
    if isinstance(value, Mapping):
        return _unless_known(value, {name: as_fields(entry) for name, entry in value.items()})
    if isinstance(value, (list, tuple)) and not is_packed(value):
        return _unless_known(value, (list if isinstance(value, list) else tuple)(map(as_fields, value)))
    return value


def _unless_known(value: Any, plain: Any) -> Any:
    """The container itself where pytree opens it and its entries are unchanged, else the `plain` one."""
    entries = pytree.tree_leaves(value, is_leaf=lambda entry: entry is not value)
    known = not (len(entries) == 1 and entries[0] is value)
    pairs = zip(value.values(), plain.values()) if isinstance(plain, dict) else zip(value, plain)  # noqa: B905 - of one length
    return value if known and all(old is new for old, new in pairs) else plain


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that `example` stands for: a tensor, a tuple or list, or a mapping.

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def trim(example: Any, *, samples: int) -> Any:
    """The first `samples` rows of every tensor whose first axis has the batch length, that of the first tensor.

    The whole example where another tensor may number rows that would be removed, such as the edges of a graph.

    >>> trim((torch.zeros(8, 3), torch.ones(5, 5)), samples=2)[0].shape
    torch.Size([2, 3])
    >>> trim((torch.zeros(8, 3), torch.tensor([[0, 1], [6, 7]])), samples=2)[0].shape
    torch.Size([8, 3])
    """
    length = batch_length(example)
    if fewest_samples(example, samples) > samples:
        return example
    return pytree.tree_map_only(Tensor, lambda t: t[:samples] if has_rows(t, length) else t, example, is_leaf=is_packed)


def fewest_samples(example: Any, samples: int) -> int:
    """How many samples an example may be cut to: `samples`, or all where other parts of it may number rows."""

    def may_number(leaf: Any) -> bool:
        """Whether a part may hold the number of a row beyond the first `samples`."""
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return is_packed(leaf)
        return is_dense(leaf) and not (leaf.is_complex() or leaf.is_meta) and bool((leaf >= samples).any())

    length = batch_length(example)
    others = (leaf for leaf in leaves_of(example) if not has_rows(leaf, length))
    return max(samples, length) if any(map(may_number, others)) else samples


def batch_length(example: Any) -> int:
    """The number of samples of an example: the first axis of its first tensor that has axes, or 0.

    >>> batch_length({"t": torch.tensor(0.5), "x": torch.zeros(4, 3)})
    4
    """
    return next((len(leaf) for leaf in leaves_of(example) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def numbers_in(example: Any) -> int:
    """How many numbers the tensors of an example have.

    >>> numbers_in((torch.zeros(2, 3), None, torch.zeros(4)))
    10
    """
    return sum(leaf.numel() for leaf in leaves_of(example) if isinstance(leaf, Tensor))


def plain_mapping(example: Any) -> Any:
    """A plain dict of an example that is a mapping, of which pytree opens few; other examples as they are."""
    return dict(example) if isinstance(example, Mapping) else example


def each_tensor(change: Callable[[Tensor], Tensor], example: Any) -> Any:
    """An example with `change` applied to its tensors; one that is there twice stays one tensor."""
    memo: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = change(tensor)
        return memo[id(tensor)]

    return pytree.tree_map_only(Tensor, changed, example)


def has_twins(example: Any) -> bool:
    """Whether an example holds one tensor twice."""
    tensors = [id(leaf) for leaf in leaves_of(example) if isinstance(leaf, Tensor)]
    return len(tensors) > len(set(tensors))


def copied(example: Any) -> Any:
    """An example with copies of its tensors."""
    return each_tensor(torch.clone, example)


def leaves_of(example: Any) -> list[Any]:
    """All that an example holds, in order: tensors, packed sequences, and other values."""
    leaves: list[Any] = pytree.tree_leaves(plain_mapping(example), is_leaf=is_packed)
    return leaves


def has_rows(leaf: Any, length: int) -> bool:
    """Whether a part of an example has one row for each of `length` samples."""
    return is_dense(leaf) and leaf.ndim > 0 and len(leaf) == length


def is_dense(leaf: Any) -> bool:
    """Whether a value is a tensor that is neither sparse nor nested."""
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested


def check_dense(value: Any, what: str, error: type[FxpruneError], *, strided: bool = False, meta: bool = False) -> None:
    """Raise `error`, about `what`, where a nested value holds a tensor that cannot be used in computations.

    Sparse tensors have to be in the COO layout; none are allowed where all tensors have to be `strided`.
    """
    layouts = (torch.strided,) if strided else (torch.strided, torch.sparse_coo)
    for leaf in (leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)):
        if is_lazy(leaf):
            raise error(f"{what} holds an uninitialised parameter: run its module once before")
        if leaf.is_nested:
            raise error(f"{what} holds a nested tensor: pad it, torch.nested.to_padded_tensor(x, 0.0), and pass a mask")
        if leaf.layout not in layouts:
            raise error(f"{what} holds a tensor of the layout {leaf.layout}: make it dense, x.to_dense()")
        if not meta and (leaf.is_meta or isinstance(leaf, FakeTensor)):
            raise error(f"{what} holds a tensor of shape {tuple(leaf.shape)} without numbers: load them to a device")


def plain(example: Any) -> Any:
    """An example with plain tensors for those of subclasses, except subclasses with a `__torch_dispatch__`.

    Some subclasses cannot be deep-copied.
    """

    def as_plain(leaf: Any) -> Any:
        adds = not isinstance(leaf, Tensor) or type(leaf).__torch_dispatch__ != Tensor.__torch_dispatch__
        return leaf if adds or type(leaf) is Tensor else leaf.as_subclass(Tensor)

    return pytree.tree_map(as_plain, example, is_leaf=is_packed)


def to_device(values: Any, device: torch.device) -> Any:
    """`values` with their tensors on `device`; where some are on an accelerator already, those on the CPU stay there.

    A forward may need such tensors on the CPU: the lengths by which it packs sequences, for example.
    """
    devices = {leaf.device.type for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
    any_moved = bool(devices - {"cpu", "meta"})

    def moved(tensor: Tensor) -> Tensor:
        goal = tensor.device if any_moved and tensor.device.type == "cpu" else device
        return (tensor.clone() if tensor.is_inference() else tensor).to(goal)

    return pytree.tree_map_only(Tensor, moved, values)


def to_json(example: Any) -> Any:
    """A JSON description of an example, from which `from_json` makes one of the same shapes and dtypes.

    >>> to_json((torch.zeros(2, 3), {"flag": None}))
    [{'tensor': [2, 3], 'dtype': 'float32'}, {'flag': None}]
    """
    return _described(example, batch_length(example))


def _described(example: Any, length: int) -> Any:
    """The description of an example of a batch length, or of a part of it."""
    if isinstance(example, Tensor):
        described = {"tensor": list(example.shape), "dtype": dtype_name(example)}
        if example.dtype in (torch.int32, torch.int64) and example.numel():
            return described | {"largest": int(example.max())}
        row = _kept_row(example, length)
        return described if row is None else described | {"row": row}
    if isinstance(example, Mapping):
        return {str(name): _described(value, length) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return [_described(value, length) for value in example]
    if example is None or isinstance(example, (bool, int, float, str)):
        return example
    raise CaptureError(
        f"the example holds {a_kind(example)}, which a plan cannot describe: "
        "give tensors, numbers, strings, None, and tuples, lists or dicts of these"
    )


def _kept_row(tensor: Tensor, length: int) -> list[float] | None:
    """The first row of floats that are not samples, whose values may matter; None for other or long rows."""
    if not (tensor.is_floating_point() and is_dense(tensor) and tensor.numel()) or has_rows(tensor, length):
        return None
    first = tensor.detach()[0] if tensor.ndim else tensor.detach()
    return first.double().flatten().tolist() if first.numel() <= LONGEST_ROW else None


def from_json(description: Any, *, device: torch.device | str = "cpu") -> Any:
    """An example of a description that `check_example` accepts.

    Integers all have the original's largest value; floats are seeded normal numbers, or the row that the plan keeps.
    """
    if isinstance(description, Mapping) and "tensor" in description:
        shape, dtype = description["tensor"], getattr(torch, description["dtype"])
        if not dtype.is_floating_point:
            return torch.full(shape, description.get("largest", 0), dtype=dtype, device=device)
        if "row" in description:
            row = torch.tensor(description["row"], dtype=torch.float64).reshape(shape[1:])
            return row.expand(shape).to(device, dtype, copy=True)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)
    if isinstance(description, Mapping):
        return {name: from_json(value, device=device) for name, value in description.items()}
    if isinstance(description, list):
        return tuple(from_json(value, device=device) for value in description)
    return description


def check_example(description: Any) -> None:
    """Raise ValueError where a description is not one that `to_json` makes, or where the example is very large.

    >>> check_example({"tensor": [1 << 20, 1 << 20], "dtype": "float32"})
    Traceback (most recent call last):
    ValueError: it names an example batch of 4,398,046,511,104 bytes, more than 1,073,741,824: score smaller batches
    """
    size = example_bytes(description, 0)
    if size > LARGEST_EXAMPLE:
        raise ValueError(
            f"it names an example batch of {size:,} bytes, more than {LARGEST_EXAMPLE:,}: score smaller batches"
        )


def example_bytes(description: Any, depth: int) -> int:
    """The bytes of all tensors of a description; `depth` is its level of nesting. Raises as `check_example`."""
    if depth > DEEPEST:
        raise ValueError(f"the example is nested more than {DEEPEST} deep")
    if isinstance(description, Mapping) and "tensor" in description:
        return _tensor_bytes(description)
    if isinstance(description, (Mapping, list)):
        inner = description.values() if isinstance(description, Mapping) else description
        return sum(example_bytes(entry, depth + 1) for entry in inner)
    return 0


def _tensor_bytes(description: Mapping[str, Any]) -> int:
    shape, dtype, row = description["tensor"], description.get("dtype"), description.get("row")
    largest = description.get("largest", 0)
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape) or len(shape) > DEEPEST:
        raise ValueError(f"the example names the shape {shape!r}, which is no list of sizes")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"the example names the dtype {dtype!r}, which torch does not have")
    if type(largest) is not int or not -(2**63) <= largest < 2**63:
        raise ValueError(f"the example names {largest!r} for the largest of its numbers")
    length = math.prod(shape[1:])
    numbers = isinstance(row, list) and len(row) == length and all(type(n) in (int, float) for n in row)
    if row is not None and not numbers:
        raise ValueError(f"the example names a row of a tensor of shape {shape} that is not {length} numbers")
    kind: torch.dtype = getattr(torch, dtype)
    return math.prod(shape) * kind.itemsize
