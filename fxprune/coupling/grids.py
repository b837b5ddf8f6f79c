"""Classes of tied labels, and the choice between removing rows or columns of a grid."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxprune.caller.arrays import Flags, Index
from fxprune.rules.vocabulary import Option

_Choice = tuple[Sequence[Option], bool]


def label_pairs(a: Tensor, b: Tensor) -> tuple[Index, Index]:
    """The pairs of two label tensors, broadcast, in memory order without immediate repeats; -1 is no label."""
    if a.shape == b.shape and a.numel() == max(a.shape, default=1):
        return flat_labels(a), flat_labels(b)
    a, b = torch.broadcast_tensors(a, b)
    order = sorted(range(a.ndim), key=lambda axis: -max(a.stride()[axis], b.stride()[axis]))
    left, right = a.permute(order).reshape(-1), b.permute(order).reshape(-1)
    new = torch.ones(len(left), dtype=torch.bool)
    torch.logical_or(left[1:] != left[:-1], right[1:] != right[:-1], out=new[1:])
    return flat_labels(left[new]), flat_labels(right[new])


def flat_labels(labels: Tensor) -> Index:
    """A label tensor as a flat array of integers; -1 is no label."""
    flat: Index = labels.reshape(-1).numpy().astype(np.int64)
    return flat


def present_labels(labels: Tensor) -> Index:
    """The labels of a tensor, without -1."""
    flat = flat_labels(labels)
    return flat[flat >= 0]


def components(size: int, a: Index, b: Index) -> Index:
    """Connected components of `size` nodes under the edges (a[i], b[i])."""
    edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(size, size))
    parts: Index = connected_components(edges, directed=False)[1].astype(np.int64)
    return parts


def distinct_choices(choices: Iterable[_Choice]) -> Collection[_Choice]:
    """The choices without repeats, which a chain of nodes with the same labels gives."""
    return {(_storage(options), ordered): (options, ordered) for options, ordered in choices}.values()


def _storage(options: Sequence[Option]) -> tuple[Any, ...]:
    """Where in memory the labels of options lie, which identifies them."""
    return tuple((tuple((_place(a), _place(b)) for a, b in o.ties), tuple(map(_place, o.kept))) for o in options)


def _place(labels: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return labels.data_ptr(), tuple(labels.shape), labels.stride()


def choose_option(classes: Classes, options: Sequence[Option], *, ordered: bool) -> None:
    """Apply the first of the options with the most removable units; if `ordered`, the first with two or more."""
    trials = [_trial(classes, option) for option in options]
    _, touched, roots, held = max(trials, key=lambda trial: min(trial[0], 2) if ordered else trial[0])
    classes.frozen[held] = True
    classes.frozen[roots[classes.frozen[touched]]] = True
    classes.united[touched] = roots


def _trial(classes: Classes, option: Option) -> tuple[int, Index, Index, Index]:
    """An option's number of removable units, the classes it touches, what each unites with, and those it freezes."""
    pairs = [label_pairs(a, b) for a, b in option.ties]
    left, right = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    both, alone = (left >= 0) & (right >= 0), (left < 0) != (right < 0)
    a, b = classes.of(left[both]), classes.of(right[both])
    held = classes.of(
        np.concatenate([np.maximum(left, right)[alone], *(present_labels(labels) for labels in option.kept)])
    )
    touched, inverse = classes.distinct(np.concatenate([a, b]))
    parts = components(len(touched), inverse[: len(a)], inverse[len(a) :])
    count = parts.max(initial=-1) + 1
    first, stuck = np.empty(count, dtype=np.int64), np.zeros(count, dtype=bool)
    first[parts[::-1]] = np.arange(len(parts))[::-1]
    stuck[parts[classes.frozen[touched] | classes.among(touched, held)]] = True
    return int(count - stuck.sum()), touched, touched[first][parts], held


class Classes:
    """The classes of tied labels while options are chosen (a union-find over arrays).

    `united` maps each class to one that it was united with, up to a root that maps to itself; `frozen` marks roots.
    Sets of classes are marked in arrays over all of them, which is much faster than sorting.
    """

    def __init__(self, merged: Index, frozen: Flags) -> None:
        self.merged, self.frozen, self.united = merged, frozen, np.arange(len(frozen))
        self._places, self._marks = np.empty(len(frozen), dtype=np.int64), np.zeros(len(frozen), dtype=bool)

    def of(self, labels: Index) -> Index:
        """The classes of labels."""
        start = self.merged[labels]
        found: Index = self.united[start]
        while not np.array_equal(found, above := self.united[found]):
            found = above
        self.united[start] = found  # the next search is short
        return found

    def distinct(self, classes: Index) -> tuple[Index, Index]:
        """The different ones, rising, and where in them each of the given ones is."""
        order = np.arange(len(classes))
        self._places[classes] = order
        found = np.sort(classes[self._places[classes] == order])
        self._places[found] = np.arange(len(found))
        return found, self._places[classes]

    def among(self, classes: Index, others: Index) -> Flags:
        """Which of the classes are among others."""
        self._marks[others] = True
        found: Flags = self._marks[classes]
        self._marks[others] = False
        return found


def units_at(unit_of: Index, labels: Index) -> Index:
    """The units of an array of labels, -1 where there is no label."""
    return np.where(labels < 0, -1, unit_of[labels]) if len(unit_of) else np.full(len(labels), -1)
