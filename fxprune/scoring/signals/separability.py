"""U-Score: the distance between a unit's activations on the two classes that it separates best (arXiv 2508.02291)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fxprune.scoring.signals.diameter import diameter

_CHUNK = 1 << 22  # numbers of quantile functions in memory at once


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
        (units,) in the units of the activations; zeros where there is only one class.

    >>> separability(torch.tensor([[[0.0]], [[1.0]], [[4.0]]]), torch.tensor([0, 0, 1]))
    tensor([3.5000])
    """
    units, projections = samples.shape[1:]
    if not units:
        return samples.new_zeros(0)
    present, counts = torch.unique(classes, return_counts=True)
    middles, widths = _cells(counts)
    rows = [(classes == label).nonzero().flatten() for label in present]
    step = max(1, _CHUNK // (len(rows) * projections * len(widths)))
    scale = (widths / projections).to(samples)
    return torch.cat(
        [diameter((_quantiles(part, rows, middles) * scale).flatten(2)) for part in samples.split(step, dim=1)]
    )


def _cells(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The middles and widths of the cells on which the quantile functions of so many samples are constant.

    W1 on the line is the L1 distance of quantile functions, so the sum over these cells is exact.
    """
    sizes = counts.unique().tolist()
    ends = torch.cat([torch.arange(1, n + 1, dtype=torch.float64) / n for n in sizes]).sort().values
    ends = ends[torch.cat([torch.diff(ends) > 1e-12, torch.ones(1, dtype=torch.bool)])]
    widths = torch.diff(ends, prepend=ends.new_zeros(1))
    return ends - widths / 2, widths


def _quantiles(samples: Tensor, rows: list[Tensor], middles: Tensor) -> Tensor:
    """The quantile functions (units, classes, projections, cells) of classes whose samples are in the given rows."""
    found = []
    for own in rows:
        ordered = samples[own].permute(1, 2, 0).contiguous().numpy()
        ordered.sort(axis=-1)  # numpy sorts many short rows several times faster than torch does on a CPU
        values, cells = torch.from_numpy(ordered), (middles * len(own)).long()
        found.append(values if len(own) == len(cells) else values[..., cells])
    return torch.stack(found, dim=1)
