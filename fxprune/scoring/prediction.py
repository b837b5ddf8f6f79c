"""The prediction of removed channels from kept ones, by the moments of the scoring pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.caller.arrays import Flags, Scalars
from fxprune.scoring.moments import Moments

STRENGTH = 1e-3  # of the ridge, by the mean variance of the kept channels
TINY = 1e-12  # the least mean variance


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Removed channels as a function of kept ones: map @ x + offset, both zero for the kept channels."""

    map: Scalars
    offset: Scalars


def prediction(moments: Moments, kept: Flags, *, linear: bool, groups: int = 1) -> Prediction:
    """The ridge regression of the removed channels on the kept ones of their group; on none where not `linear`.

    >>> moments = Moments(np.array([1.0, 2.0]), np.array([[1.0, 2.0], [2.0, 4.0]]))
    >>> prediction(moments, np.array([True, False]), linear=True).map.round(2)
    array([[0., 0.],
           [2., 0.]])
    """
    found = np.zeros((len(kept), len(kept)), dtype=moments.covariance.dtype)
    for own in np.split(np.arange(len(kept)), groups):
        stay, gone = own[kept[own]], own[~kept[own]]
        if linear and moments.covariance.ndim == 2 and len(stay) and len(gone):
            within = moments.covariance[np.ix_(stay, stay)]
            within[np.diag_indices(len(stay))] += STRENGTH * max(float(np.trace(within)) / len(stay), TINY)
            across = moments.covariance[np.ix_(stay, gone)]
            found[np.ix_(gone, stay)] = np.linalg.solve(within, across).T
    return Prediction(found, np.where(kept, 0.0, moments.mean - found @ moments.mean))
