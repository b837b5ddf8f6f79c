"""Means and covariances of what layers read, from rows sampled in the scoring pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDEST = 4096  # channels of which the covariance is kept; of wider edges, the variances only
ROWS = 1024  # of a batch that enter at the most, or two for each channel where that is more
Key = tuple[str, str]  # the node that gives the channels, and the axis or the parameter by which they are read


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The mean (P,) and covariance (P, P) of P channels; of more than 4096, the variances (P,) alone."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """The variance of each channel."""
        return self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)

    def arrays(self) -> Mapping[str, Any]:
        """The numbers in single precision, as arrays of their names."""
        return {"mean": self.mean.astype(np.float32), "covariance": self.covariance.astype(np.float32)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> Moments:
        """The moments that `arrays` were taken from."""
        return cls(arrays["mean"].astype(np.float64), arrays["covariance"].astype(np.float64))


class Gathering:
    """Adds up rows of activations, seeded ones of each tensor.

    >>> gathering = Gathering(seed=0)
    >>> gathering.add(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), dim=1)
    >>> gathering.moments().covariance
    array([[1., 0.],
           [0., 0.]])
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = 0
        self.origin: Tensor | None = None
        self.sums: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, x: Tensor, dim: int) -> None:
        """Add rows of a tensor whose channels lie along axis `dim`."""
        rows = self._sampled(x.detach().movedim(dim, -1))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.origin is None:  # squares of what lies far from zero would drown the covariance
            self.origin = rows.mean(0)
        rows = rows - self.origin
        products = rows.T @ rows if rows.shape[1] <= WIDEST else rows.square().sum(0)
        if self.sums is None or self.products is None:
            self.sums, self.products = rows.sum(0).double(), products.double()
        else:
            self.sums += rows.sum(0)
            self.products += products
        self.rows += len(rows)

    def moments(self) -> Moments:
        """The moments of all rows so far."""
        if self.origin is None or self.sums is None or self.products is None:
            raise ValueError("nothing was added")
        mean = self.sums / self.rows
        square = mean.square() if self.products.ndim == 1 else mean.outer(mean)
        covariance = (self.products / self.rows - square).cpu().numpy()
        return Moments((mean + self.origin.double()).cpu().numpy(), covariance)

    def _sampled(self, x: Tensor) -> Tensor:
        """Some rows (n, channels) of a tensor (..., channels)."""
        count = x[..., 0].numel()
        wanted = max(ROWS, 2 * x.shape[-1])
        if count <= wanted:
            return x.reshape(-1, x.shape[-1])
        chosen = torch.randint(count, (wanted,), generator=self.generator)
        return x[torch.unravel_index(chosen.to(x.device), x.shape[:-1])]
