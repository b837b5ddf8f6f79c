"""Other batches of the form of an example: of other values, numbers of samples, lengths and layouts in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.example import (
    batch_length,
    fewest_samples,
    has_rows,
    is_dense,
    is_packed,
    leaves_of,
    plain_mapping,
)

_RANK_OF_IMAGES = 4
Place = tuple[int, int]  # the number of a tensor among the leaves of an example, and one of its axes


def varied_batch(example: Any, samples: int) -> Any:
    """A batch of `samples` samples with the form of `example` and other values.

    The rows of every tensor whose first axis has the batch length are repeated, rolled by one. Fractions are mixed with
    the next row, and each row is scaled by a factor below 1. Whole numbers, such as those of a mask, keep their values,
    except that a first tensor of zeros or ones is drawn anew. Other parts are kept; if they may number rows, no samples
    are removed.

    >>> varied_batch((torch.tensor([[1, 2], [3, 4]]), torch.tensor([0.5, 1.5]), torch.zeros(3)), 3)
    (tensor([[3, 4],
            [1, 2],
            [3, 4]]), tensor([1.0417, 0.5000, 0.6250]), tensor([0., 0., 0.]))
    """
    leaves, structure = pytree.tree_flatten(plain_mapping(example), is_leaf=is_packed)
    length, samples = batch_length(example), fewest_samples(example, samples)
    varied = [
        _varied_rows(leaf, samples) if length and has_rows(leaf, length) else leaf for leaf in _told_apart(leaves)
    ]
    first = next((i for i, leaf in enumerate(varied) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is not None and _is_blank(varied[first]):
        varied[first] = _noise_like(varied[first])
    return pytree.tree_unflatten(varied, structure)


def _told_apart(leaves: Sequence[Any]) -> Iterator[Any]:
    """The leaves of an example; a floating tensor that equals an earlier one is turned around along its last axis."""
    for number, leaf in enumerate(leaves):
        others = leaves[:number] if is_dense(leaf) and leaf.ndim and not _is_whole(leaf) else ()
        twice = any(is_dense(o) and o.dtype is leaf.dtype and torch.equal(o, leaf) for o in others)
        yield leaf.flip(-1) if twice else leaf


def _varied_rows(tensor: Tensor, samples: int) -> Tensor:
    given, rows = tensor.detach(), torch.arange(1, samples + 1, device=tensor.device)
    rolled, following = given[rows % len(given)], given[(rows + 1) % len(given)]
    if _is_whole(given):
        return rolled
    wide = _wide(given)
    factors = (1 - rows / (2 * samples)).to(wide).reshape(-1, *[1] * (given.ndim - 1))
    mixed = factors * (0.75 * rolled.to(wide) + 0.25 * following.to(wide))
    return mixed.to(given.dtype).requires_grad_(tensor.requires_grad)


def _wide(tensor: Tensor) -> torch.dtype:
    """A dtype with at least the precision of float32 for the numbers of a floating tensor."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _is_blank(tensor: Tensor) -> bool:
    """Whether a batch of floats has one value everywhere, as that of a made example has."""
    known = is_dense(tensor) and tensor.is_floating_point() and not tensor.is_meta and tensor.ndim > 1
    return known and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def _noise_like(tensor: Tensor) -> Tensor:
    """Random numbers from 0 to 1, the same ones for the same shape."""
    made = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return made.to(tensor).requires_grad_(tensor.requires_grad)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers only, as those of a mask, or none."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.itemsize == 1:  # float8, which torch cannot mix
        return True
    wide = tensor.to(_wide(tensor))
    return torch.equal(wide, wide.round())


def stretched(example: Any, axis: int) -> Any:
    """An example in which every tensor is twice as long along `axis`, if it has that axis.

    >>> stretched((torch.zeros(2, 3, 4), torch.zeros(2)), 2)[0].shape
    torch.Size([2, 3, 8])
    """

    def longer(leaf: Any) -> Any:
        return leaf.repeat_interleave(2, axis) if is_dense(leaf) and leaf.ndim > axis else leaf

    return pytree.tree_map(longer, example, is_leaf=is_packed)


def lengths_of(example: Any) -> dict[int, list[Place]]:
    """All lengths in an example but the number of samples, each with the places that have it.

    >>> lengths_of((torch.zeros(2, 5, 3), torch.zeros(2, 5)))
    {5: [(0, 1), (1, 1)], 3: [(0, 2)]}
    """
    found: dict[int, list[Place]] = {}
    for number, leaf in enumerate(leaves_of(example)):
        if is_dense(leaf) and leaf.numel():
            for axis in range(int(has_rows(leaf, batch_length(example))), leaf.ndim):
                found.setdefault(leaf.shape[axis], []).append((number, axis))
    return found


def resized(example: Any, places: Sequence[Place], length: int) -> Any:
    """An example of another length in some places: cut there, or extended by entries of other samples.

    Fractions among these are made four times as large, lest the largest entries stay the same.

    >>> resized(torch.tensor([[1, 2], [3, 4]]), [(0, 1)], 3)
    tensor([[1, 2, 3],
            [3, 4, 1]])
    """
    leaves, structure = pytree.tree_flatten(plain_mapping(example), is_leaf=is_packed)
    for number, axis in places:
        given = leaves[number].detach()
        beyond = torch.arange(max(length - given.shape[axis], 0), device=given.device) % given.shape[axis]
        kept = given.narrow(axis, 0, min(length, given.shape[axis]))
        more = given.roll(1, 0).index_select(axis, beyond)
        leaves[number] = torch.cat([kept, more if _is_whole(more) else 4 * more], axis)
    return pytree.tree_unflatten(leaves, structure)


def in_other_layouts(example: Any) -> Iterator[Any]:
    """An example whose tensors lie in memory as those of a transposed batch do, and as images by channels do.

    >>> [x.is_contiguous() for x in in_other_layouts(torch.zeros(2, 3, 4, 5))]
    [False, False]
    """
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t,
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == _RANK_OF_IMAGES else t,
    )
    for way in ways:
        yield pytree.tree_map(lambda leaf, way=way: way(leaf) if is_dense(leaf) else leaf, example, is_leaf=is_packed)
