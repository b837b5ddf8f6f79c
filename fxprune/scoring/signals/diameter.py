"""The largest L1 distance between two of many points: exact, and without comparing all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64  # points of which all pairs are compared
SWEEPS = 3  # from the point farthest off to the one farthest from that: nearly always finds the largest distance
CHUNK = 1 << 22  # numbers compared at once
SLACK = 1e-4  # by which sums of single precision may miss the triangle inequality


def diameter(points: Tensor) -> Tensor:
    """The largest L1 distance between two of the points of each unit.

    The distance of two points is at most the sum of their distances to the mean. Given these and a large distance
    that was found before, few pairs can be farther apart, and only those are compared. The result is exact.

    Args:
        points: (units, points, coordinates).

    Returns:
        (units,)

    >>> diameter(torch.tensor([[[0.0, 0.0], [1.0, 2.0], [-1.0, 0.5]]]))
    tensor([3.5000])
    """
    if points.shape[1] <= FEW:
        return _of_all_pairs(points)
    reach = _distances(points, points.mean(1))
    found = _between_far_ones(points, reach)
    return torch.stack([_of_candidates(*unit) for unit in zip(points, reach, found, strict=True)])


def _distances(points: Tensor, to: Tensor) -> Tensor:
    """The distances (units, points) of all points to one (units, coordinates)."""
    return (points - to[:, None]).abs().sum(-1)


def _of_all_pairs(points: Tensor) -> Tensor:
    best = points.new_zeros(len(points))
    for index in range(points.shape[1] - 1):
        best = torch.maximum(best, _distances(points[:, index + 1 :], points[:, index]).amax(1))
    return best


def _between_far_ones(points: Tensor, reach: Tensor) -> Tensor:
    """A distance (units,) near the largest: from the point farthest off to the one farthest from it, and so on."""
    units, best = torch.arange(len(points), device=points.device), points.new_zeros(len(points))
    for _ in range(SWEEPS):
        reach = _distances(points, points[units, reach.argmax(1)])
        best = torch.maximum(best, reach.amax(1))
    return best


def _of_candidates(points: Tensor, reach: Tensor, best: Tensor) -> Tensor:
    """The largest distance of one unit's points, `reach` off their mean, given the distance `best` of two of them."""
    ordered = reach.sort(descending=True)
    reach, points = ordered.values, points[ordered.indices]
    ends = torch.searchsorted(-reach, reach - best * (1 - SLACK))  # how many reach far enough to pair with each
    counts = (ends - torch.arange(1, len(reach) + 1, device=reach.device)).clamp_min(0)
    step, block = max(1, CHUNK // points.shape[1]), max(1, CHUNK // len(counts))
    for first in range(0, int(counts.count_nonzero()), block):
        one, other = _pairs(counts[first : first + block])
        for some, others in zip(one.split(step), other.split(step), strict=True):
            best = torch.maximum(best, (points[first + some] - points[first + others]).abs().sum(-1).amax())
    return best


def _pairs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of an index i and one of the `counts[i]` indices after it.

    >>> _pairs(torch.tensor([2, 1, 0]))
    (tensor([0, 0, 1]), tensor([1, 2, 2]))
    """
    one = torch.repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[one]
    return one, torch.arange(len(one), device=one.device) - before + one + 1
