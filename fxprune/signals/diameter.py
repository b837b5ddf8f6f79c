"""The largest L1 distance between two of many points: exact, and without comparing all of them."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64  # points of which all pairs are compared
SWEEPS = 3  # from the point farthest off to the one farthest from that: finds the largest distance nearly always
SLACK = 1e-4  # by which sums of single precision may miss the triangle inequality


def diameter(points: Tensor) -> Tensor:
    """The largest L1 distance between two of the points of each unit.

    Points are no farther apart than their distances to a third one add up to. So with the distances to the median of
    all points, and a large distance that is known already, few pairs are left that could be farther apart; those are
    compared. What comes out is the largest distance of all pairs all the same.

    Args:
        points: (units, points, coordinates).

    Returns:
        (units,)

    >>> diameter(torch.tensor([[[0.0, 0.0], [1.0, 2.0], [-1.0, 0.5]]]))
    tensor([3.5000])
    """
    if points.shape[1] <= FEW:
        return _of_all_pairs(points)
    reach = _distances(points, points.median(1).values)
    found = _between_far_ones(points, reach)
    return torch.stack([_of_candidates(*unit) for unit in zip(points, reach, found, strict=True)])


def _distances(points: Tensor, to: Tensor) -> Tensor:
    """The distances (units, points) of all points to one (units, coordinates)."""
    return (points - to[:, None]).abs().sum(-1)


def _of_all_pairs(points: Tensor) -> Tensor:
    best = points.new_zeros(len(points))
    for index in range(points.shape[1] - 1):
        distances = (points[:, index + 1 :] - points[:, index : index + 1]).abs().sum(-1)
        best = torch.maximum(best, distances.amax(1))
    return best


def _between_far_ones(points: Tensor, reach: Tensor) -> Tensor:
    """A distance (units,) near the largest: from the point farthest off to the one farthest from it, and so on."""
    units, best = torch.arange(len(points), device=points.device), points.new_zeros(len(points))
    for _ in range(SWEEPS):
        reach = _distances(points, points[units, reach.argmax(1)])
        best = torch.maximum(best, reach.amax(1))
    return best


def _of_candidates(points: Tensor, reach: Tensor, best: Tensor) -> Tensor:
    """The largest distance of one unit's points, `reach` off their median, where `best` is one that was found."""
    candidates = (reach + reach.max() >= best * (1 - SLACK)).nonzero().flatten()
    order = candidates[reach[candidates].argsort(descending=True)]
    points, reach = points[order], reach[order]
    for index in range(len(order) - 1):
        count = int((reach[index + 1 :] + reach[index] >= best * (1 - SLACK)).sum())
        if not count:
            break
        distances = (points[index + 1 : index + 1 + count] - points[index]).abs().sum(-1)
        best = torch.maximum(best, distances.max())
    return best
