"""U-Score: how far apart a unit's activations lie on the two classes that it separates best (arXiv 2508.02291)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers compared at once; bounds the memory of the comparison


@lru_cache(maxsize=32)
def directions(size: int, count: int, *, seed: int) -> Tensor:
    """`count` seeded random unit vectors of `size` entries, as columns; the one number 1 where `size` is 1."""
    if size == 1:
        return torch.ones(1, 1)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + size)
    normal = torch.randn(size, count, generator=generator)
    return torch.nn.functional.normalize(normal, dim=0)


def separability(samples: Tensor, classes: Tensor) -> Tensor:
    """The largest 1-Wasserstein distance between two classes, of each unit.

    Args:
        samples: (samples, units, projections), activations of each unit projected on each direction; sliced W1 is
            the mean over the projections of the exact one-dimensional distance.
        classes: (samples,) integers.

    Returns:
        (units,) in the units of the activations; zeros where there is one class only.

    >>> separability(torch.tensor([[[0.0]], [[1.0]], [[4.0]]]), torch.tensor([0, 0, 1]))
    tensor([3.5000])
    """
    units, projections = samples.shape[1:]
    if not units:
        return samples.new_zeros(0)
    quantiles, widths = _quantile_functions(samples, classes)
    points = (quantiles * (widths / projections)).flatten(2)
    step = max(1, _CHUNK // points[0].numel())
    return torch.cat([_diameter(part) for part in points.split(step)])


def _diameter(points: Tensor) -> Tensor:
    """The largest L1 distance between two of the points, of each unit; points is (units, points, coordinates)."""
    best = points.new_zeros(len(points))
    for index in range(points.shape[1] - 1):
        distances = (points[:, index + 1 :] - points[:, index : index + 1]).abs().sum(-1)
        best = torch.maximum(best, distances.amax(1))
    return best


def _quantile_functions(samples: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The quantile function of each class on one grid that has every class's steps, and the widths of its cells.

    W1 on the line is the L1 distance of quantile functions; those of samples are steps, so the sum is exact.
    Returns (units, classes, projections, cells) and (cells,).
    """
    present, counts = torch.unique(classes, return_counts=True)
    ends = sorted({(step, int(n)) for n in counts.unique() for step in range(1, int(n) + 1)}, key=lambda e: e[0] / e[1])
    positions = torch.tensor([step / n for step, n in ends], dtype=torch.float64)
    keep = torch.cat([torch.diff(positions) > 1e-12, torch.ones(1, dtype=torch.bool)])
    positions = positions[keep]
    widths = torch.diff(positions, prepend=positions.new_zeros(1))
    middles = positions - widths / 2
    ordered = (_sorted(samples[classes == label]) for label in present)
    even = len(counts.unique()) == 1
    cells = [values if even else values[..., (middles * values.shape[-1]).long()] for values in ordered]
    return torch.stack(cells, dim=1), widths.to(samples)


def _sorted(samples: Tensor) -> Tensor:
    """The samples of each unit and projection in rising order: (units, projections, samples).

    numpy sorts many short rows of floats several times faster than torch does on a CPU.
    """
    rows = samples.permute(1, 2, 0).contiguous().numpy()
    rows.sort(axis=-1)
    return torch.from_numpy(rows)
