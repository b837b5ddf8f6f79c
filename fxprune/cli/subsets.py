"""A seeded subset of a dataset with as many samples of each class as there can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fxprune.caller.arrays import Index
from fxprune.cli.output import Bars

LABELS = ("targets", "labels", "_labels", "y")  # names of datasets' lists of class numbers


def balanced(labels: Index | None, total: int, count: int, seed: int) -> Index:
    """The numbers of `count` of `total` samples, class after class in turns; any samples where there are no labels.

    >>> chosen = balanced(np.array([0, 0, 0, 0, 0, 0, 1, 1]), 8, 4, seed=0)
    >>> sorted(chosen.tolist())[-2:], len(set(chosen.tolist()))
    ([6, 7], 4)
    """
    order = np.random.default_rng(seed).permutation(total)
    if labels is None:
        return order[:count]
    own = labels[order]
    by_class = np.argsort(own, kind="stable")
    _, starts, sizes = np.unique(own[by_class], return_index=True, return_counts=True)
    turn = np.empty(total, dtype=np.int64)
    turn[by_class] = np.arange(total) - np.repeat(starts, sizes)
    return order[np.argsort(turn, kind="stable")[:count]]


def labels_of(dataset: Dataset[Any], total: int, bars: Bars) -> Index | None:
    """Every sample's class number, from the dataset's own list or else sample by sample; None where it has none."""
    for name in LABELS:
        found = _numbers(getattr(dataset, name, None), total)
        if found is not None:
            return found
    if isinstance(dataset, TensorDataset):
        return _numbers(dataset.tensors[-1], total)
    targets = []
    for index in bars.steps(range(total), "reading labels"):
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2 or _numbers([sample[1]], 1) is None:
            return None
        targets.append(sample[1])
    return _numbers(targets, total)


def _numbers(values: Any, total: int) -> Index | None:
    """Values as class numbers, where they are one integer a sample."""
    if not isinstance(values, (list, tuple, np.ndarray, Tensor)) or len(values) != total:
        return None
    try:
        found = torch.as_tensor(values).cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        return None
    return found.astype(np.int64) if found.ndim == 1 and np.issubdtype(found.dtype, np.integer) else None
