"""Which entries of a tensor another holds, found by their values alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class UnmatchedError(Exception):
    """A tensor that is no product of rows, columns and so on of the other."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The indices that stay, axis by axis, and the shape that they are of."""

    axes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    @property
    def narrower(self) -> bool:
        return any(len(axis) < size for axis, size in zip(self.axes, self.shape, strict=True))

    @property
    def reads_less(self) -> bool:
        return any(len(axis) < size for axis, size in zip(self.axes[1:], self.shape[1:], strict=True))


def kept(full: Tensor, part: Tensor, name: str = "") -> Kept:
    """What `part` holds of `full`, whose entries are random numbers.

    Raises UnmatchedError, with the name, where it holds other values.

    >>> kept(torch.tensor([[1., 2., 3.], [4., 5., 6.]]), torch.tensor([[4., 6.]])).axes
    ((1,), (0, 2))
    """
    shape = tuple(full.shape)
    if full.ndim != part.ndim:
        raise UnmatchedError(f"{name}: {tuple(part.shape)} is no part of {shape}")
    whole, some = full.numpy(), part.numpy()
    found, known = _places(whole.ravel(), some.ravel())
    theirs, ours = np.unravel_index(found[known], shape), np.unravel_index(np.flatnonzero(known), some.shape)
    axes = tuple(_axis(whole, some, axis, theirs[axis], ours[axis]) for axis in range(len(shape)))
    if not np.allclose(whole[np.ix_(*axes)], some, rtol=1e-4, atol=1e-6):
        raise UnmatchedError(f"{name}: what stays of {shape} has other values")
    return Kept(axes, shape)


def masked(full: Tensor, kept: Kept, *, first: int) -> Tensor:
    """`full` with zeros where something went, looking at the axes from `first` on."""
    mask = torch.ones_like(full)
    for axis, indices in enumerate(kept.axes):
        if axis >= first:
            along = torch.zeros(full.shape[axis]).index_fill(0, torch.tensor(indices, dtype=torch.long), 1.0)
            mask = mask * along.view([-1 if i == axis else 1 for i in range(full.ndim)])
    return full * mask


def _places(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted value is, and whether it is there, or next to it by rounding, and once only."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    spot = np.searchsorted(ranked, wanted).clip(0, len(ranked) - 1)
    before = (spot - 1).clip(0)
    spot = np.where(np.abs(ranked[before] - wanted) < np.abs(ranked[spot] - wanted), before, spot)
    near = 1e-6 * np.abs(wanted) + 1e-9
    counts = np.searchsorted(ranked, wanted + near, "right") - np.searchsorted(ranked, wanted - near, "left")
    return order[spot], (counts == 1) & (np.abs(ranked[spot] - wanted) <= near)


def _axis(whole: np.ndarray, some: np.ndarray, axis: int, theirs: np.ndarray, ours: np.ndarray) -> tuple[int, ...]:
    """Which index along an axis each of those that are left was.

    Those without a known value (zeros, say) take the first free ones that hold all of their values.
    """
    size, left = whole.shape[axis], some.shape[axis]
    if size == left:
        return tuple(range(size))
    found = {int(own): int(index) for own, index in zip(ours, theirs, strict=True)}
    for own in sorted(set(range(left)) - found.keys()):
        values = some.take(own, axis)
        free = sorted(set(range(size)) - set(found.values()))
        found[own] = next((i for i in free if np.isin(values, whole.take(i, axis)).all()), free[0])
    return tuple(found[own] for own in range(left))
