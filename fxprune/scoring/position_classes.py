"""Classes of positions: one class for every step of a sequence, or pixel of a map, in place of one for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxprune.scoring.moments import hashed


def resized(classes: Tensor, size: Sequence[int]) -> Tensor:
    """A class map (samples, *positions) resized to other positions: each takes the class of the nearest.

    >>> resized(torch.tensor([[0, 0, 1, 1]]), (2,))
    tensor([[0, 1]])
    """
    for axis, (before, after) in enumerate(zip(classes.shape[1:], size, strict=True), start=1):
        nearest = ((torch.arange(after, dtype=torch.float64) + 0.5) * before / after).long()
        classes = classes.index_select(axis, nearest)
    return classes


def first_of_each(labels: Tensor, keys: Tensor, count: int) -> Tensor:
    """The indices of the `count` lowest keys of each label, label by label.

    >>> first_of_each(torch.tensor([1, 0, 1, 1]), torch.tensor([0.3, 0.9, 0.2, 0.7]), 2)
    tensor([1, 2, 0])
    """
    order = torch.argsort(keys)
    order = order[torch.argsort(labels[order], stable=True)]
    ordered = labels[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return order[rank < count]


@dataclass(frozen=True, slots=True)
class ChosenPositions:
    """Positions of a tensor: their index along the samples and each axis of positions, their classes and keys."""

    index: tuple[Tensor, ...]
    labels: Tensor
    keys: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ClassMap:
    """The classes of a batch's positions, (samples, *positions), negative where a position is left out.

    Of every class the `per_class` positions with the lowest keys are chosen, the same in all tensors of one size. Keys
    are random numbers by a seed and the `numbers` (samples,) of the samples: positions of all batches compare.
    """

    classes: Tensor
    numbers: Tensor
    per_class: int
    seed: int
    chosen: dict[tuple[int, ...], ChosenPositions] = field(default_factory=dict)

    def fits(self, size: Sequence[int]) -> bool:
        """Whether a tensor of shape (samples, *positions) has as many axes as the classes, and as many samples."""
        return len(size) == self.classes.ndim and size[0] == len(self.classes)

    def positions(self, size: Sequence[int]) -> ChosenPositions:
        """The chosen positions in a tensor of shape (samples, *positions)."""
        key = tuple(size[1:])
        if key not in self.chosen:
            count, labels = math.prod(key), resized(self.classes, key).flatten()
            numbers = (self.numbers.numpy()[:, None] * count + np.arange(count)).reshape(-1)
            keys = torch.from_numpy((hashed(numbers, self.seed + count) >> np.uint64(11)).astype(np.float64))
            counted = torch.nonzero(labels >= 0)[:, 0]
            first = counted[first_of_each(labels[counted], keys[counted], self.per_class)]
            self.chosen[key] = ChosenPositions(torch.unravel_index(first, tuple(size)), labels[first], keys[first])
        return self.chosen[key]
