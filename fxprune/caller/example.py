"""What the forward of a model was given: example batches, and their description in names, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError, FxpruneError, PlanError

LARGEST_EXAMPLE = 1 << 30  # bytes of the example batch that a file describes
DEEPEST = 50

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
    """`value` with a `TensorSpec` in the place of every tensor, and a `PackedSpec` in that of packed sequences."""
    if isinstance(value, Tensor):
        return _leaf_spec(value)
    return pytree.tree_map(_leaf_spec, opened(value), is_leaf=_is_packed)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _leaf_spec(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSpec(tuple(value.data.shape), value.data.dtype, value.data.device)
    return TensorSpec(tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


def opened(value: Any) -> Any:
    """`value` with a dict of those fields that are given in the place of every dataclass of the user's.

    So are other mappings dicts, and subclasses of lists and tuples plain ones, where pytree does not know them.

    >>> opened([TensorSpec((2,), torch.float32, torch.device("cpu"))])[0]["shape"]
    (2,)
    """
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: opened(entry) for name, entry in given.items() if entry is not None}
    if isinstance(value, Mapping):
        return _unless_known(value, {name: opened(entry) for name, entry in value.items()})
    if isinstance(value, (list, tuple)) and not _is_packed(value):
        return _unless_known(value, (list if isinstance(value, list) else tuple)(map(opened, value)))
    return value


def _unless_known(value: Any, plain: Any) -> Any:
    """A container itself, where pytree opens it and nothing inside of it had to be opened; else the `plain` one."""
    known = not pytree.tree_is_leaf(value)
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
    """The first `samples` rows of every tensor that has the length of the batch: the first axis of the first tensor.

    All of the example where another tensor holds numbers that may be those of rows which would go, as the edges of a
    graph and the boxes of images do.

    >>> trim((torch.zeros(8, 3), torch.ones(5, 5)), samples=2)[0].shape
    torch.Size([2, 3])
    >>> trim((torch.zeros(8, 3), torch.tensor([[0, 1], [6, 7]])), samples=2)[0].shape
    torch.Size([8, 3])
    """
    length = batch_length(example)
    if _fewest(example, samples) > samples:
        return example
    return pytree.tree_map_only(
        Tensor, lambda t: t[:samples] if _has_rows(t, length) else t, example, is_leaf=_is_packed
    )


def _fewest(example: Any, samples: int) -> int:
    """How many samples an example may be cut to: `samples`, or all where others of its parts may number them."""
    length = batch_length(example)
    others = (leaf for leaf in _leaves(example) if not _has_rows(leaf, length))
    return max(samples, length) if any(_may_number(leaf, samples) for leaf in others) else samples


def _may_number(leaf: Any, samples: int) -> bool:
    """Whether a part of an example may hold the number of a row that is not one of the first `samples`."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return _is_packed(leaf)
    plain = leaf.layout is torch.strided and not (leaf.is_nested or leaf.is_complex() or leaf.is_meta)
    return plain and bool((leaf >= samples).any())


def batch_length(example: Any) -> int:
    """The number of samples of an example, the first axis of its first tensor; 0 where none has one.

    >>> batch_length({"t": torch.tensor(0.5), "x": torch.zeros(4, 3)})
    4
    """
    return next((len(leaf) for leaf in _leaves(example) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _leaves(example: Any) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(
        dict(example) if isinstance(example, Mapping) else example, is_leaf=_is_packed
    )
    return leaves


def another(example: Any, samples: int) -> Any:
    """A batch of `samples` samples like those of `example`, of other values.

    The rows of every tensor that has the length of the batch, which is the first axis of the first tensor, are taken
    again, rolled by one. Floats are mixed with the next row and made smaller, each row by another factor; integers,
    bools and floats that are all whole numbers, such as those of a mask, stay what they are. All else is kept. Where
    that may hold numbers of rows, there are no fewer samples than in the example.

    >>> another((torch.tensor([[1, 2], [3, 4]]), torch.tensor([0.5, 1.5]), torch.zeros(3)), 3)
    (tensor([[3, 4],
            [1, 2],
            [3, 4]]), tensor([1.0417, 0.5000, 0.6250]), tensor([0., 0., 0.]))
    """
    nested = dict(example) if isinstance(example, Mapping) else example
    leaves, layout = pytree.tree_flatten(nested, is_leaf=_is_packed)
    length, samples = batch_length(example), _fewest(example, samples)
    drawn = [_drawn_again(leaf, samples) if length and _has_rows(leaf, length) else leaf for leaf in leaves]
    return pytree.tree_unflatten(drawn, layout)


def _has_rows(leaf: Any, length: int) -> bool:
    return is_dense(leaf) and leaf.ndim > 0 and len(leaf) == length


def is_dense(leaf: Any) -> bool:
    """Whether a value is a tensor that is neither sparse nor nested."""
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested


def check_dense(value: Any, what: str, error: type[FxpruneError], *, strided: bool = False, meta: bool = False) -> None:
    """Raise `error`, about `what`, where a nested value holds a tensor that nothing is computed with.

    Sparse tensors are in the COO layout, or there are none where all are to be `strided`.
    """
    layouts = (torch.strided,) if strided else (torch.strided, torch.sparse_coo)
    for leaf in _leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        if is_lazy(leaf):
            raise error(f"{what} holds an uninitialised parameter: run its module once before")
        if leaf.is_nested:
            raise error(f"{what} holds a nested tensor: pad it, torch.nested.to_padded_tensor(x, 0.0), and pass a mask")
        if leaf.layout not in layouts:
            raise error(f"{what} holds a tensor of the layout {leaf.layout}: make it dense, x.to_dense()")
        if not meta and (leaf.is_meta or isinstance(leaf, FakeTensor)):
            raise error(f"{what} holds a tensor of shape {tuple(leaf.shape)} without numbers: load them to a device")


def _drawn_again(tensor: Tensor, samples: int) -> Tensor:
    """The rows of a tensor for `samples` samples: rolled by one; those of fractions are mixed and made smaller."""
    given, rows = tensor.detach(), torch.arange(1, samples + 1, device=tensor.device)
    rolled, following = given[rows % len(given)], given[(rows + 1) % len(given)]
    wide = torch.promote_types(given.dtype, torch.float32)
    if not given.is_floating_point() or given.is_meta or torch.equal(given.to(wide), given.to(wide).round()):
        return rolled
    factors = (1 - rows / (2 * samples)).to(wide).reshape(-1, *[1] * (given.ndim - 1))
    mixed = factors * (0.75 * rolled.to(wide) + 0.25 * following.to(wide))
    return mixed.to(given.dtype).requires_grad_(tensor.requires_grad)


def stretched(example: Any, axis: int) -> Any:
    """An example in which every tensor that has this axis is twice as long there.

    >>> stretched((torch.zeros(2, 3, 4), torch.zeros(2)), 2)[0].shape
    torch.Size([2, 3, 8])
    """

    def longer(leaf: Any) -> Any:
        return leaf.repeat_interleave(2, axis) if is_dense(leaf) and leaf.ndim > axis else leaf

    return pytree.tree_map(longer, example, is_leaf=_is_packed)


def plain(example: Any) -> Any:
    """An example with plain tensors in the places of those of other classes, of which not all can be deep-copied.

    Only tensors whose class computes in a way of its own keep it.
    """

    def as_plain(leaf: Any) -> Any:
        adds = not isinstance(leaf, Tensor) or type(leaf).__torch_dispatch__ != Tensor.__torch_dispatch__
        return leaf if adds or type(leaf) is Tensor else leaf.as_subclass(Tensor)

    return pytree.tree_map(as_plain, example, is_leaf=_is_packed)


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
    return _described(example, batch_length(example))


def _described(example: Any, length: int) -> Any:
    """The description of an example, or of a part of one whose batch has a certain length."""
    if isinstance(example, Tensor):
        described = {"tensor": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
        if example.dtype in (torch.int32, torch.int64) and example.numel():
            return described | {"largest": int(example.max())}
        return described | ({"row": _first_row(example)} if _keeps_row(example, length) else {})
    if isinstance(example, Mapping):
        return {str(name): _described(value, length) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return [_described(value, length) for value in example]
    if example is None or isinstance(example, (bool, int, float, str)):
        return example
    raise CaptureError(
        f"the example holds a {type(example).__name__}, which a plan cannot describe: "
        "give tensors, numbers, strings, None, and tuples, lists or dicts of these"
    )


def _keeps_row(tensor: Tensor, length: int) -> bool:
    """Whether a plan keeps the first row of a tensor: of floats that are no samples, in which numbers may count."""
    floats = tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested
    return floats and tensor.numel() > 0 and not _has_rows(tensor, length) and _first(tensor).numel() <= LONGEST_ROW


def _first(tensor: Tensor) -> Tensor:
    return tensor[0] if tensor.ndim else tensor


def _first_row(tensor: Tensor) -> list[float]:
    row: list[float] = _first(tensor.detach()).double().flatten().tolist()
    return row


def from_json(description: Any, *, device: torch.device | str = "cpu") -> Any:
    """An example of the described shapes and dtypes.

    Integers are all the largest that there was, and floats seeded normal numbers, or the row that the plan keeps.
    """
    if isinstance(description, Mapping) and "tensor" in description:
        dtype = getattr(torch, str(description.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise PlanError(
                f"the plan's example names the dtype {description.get('dtype')!r}, which torch does not have"
            )
        if not dtype.is_floating_point:
            return torch.full(description["tensor"], description.get("largest", 0), dtype=dtype, device=device)
        if "row" in description:
            row = torch.tensor(description["row"], dtype=torch.float64).reshape(description["tensor"][1:])
            return row.expand(description["tensor"]).to(device, dtype, copy=True)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(description["tensor"], generator=generator, dtype=torch.float32).to(device, dtype)
    if isinstance(description, Mapping):
        return {name: from_json(value, device=device) for name, value in description.items()}
    if isinstance(description, list):
        return tuple(from_json(value, device=device) for value in description)
    return description


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
