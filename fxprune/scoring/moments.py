"""Means and covariances of the activations on edges, from rows sampled in the scoring pass."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprune.caller.arrays import Scalars
from fxprune.caller.ranks import summed
from fxprune.errors import blaming

SINGLE = 4096  # channels above which a covariance is of single precision, and kept in a file
WIDEST = 16384  # channels of which the covariance is kept; of wider edges, the variances only
ROWS = 32  # of a sample at most, or one for 16 channels where that is more
CONSTANT = 1e-5  # of the size of an edge's values: less variation than this is mostly rounding
BATCH_ROWS = 1024  # of a batch whose samples cannot be told apart, or two for each channel


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The mean (P,) and covariance (P, P) of P channels; above 16,384 channels the variances (P,) instead.

    Above 4,096 channels the covariance is in single precision, in a temporary file that is mapped to memory.
    """

    mean: Scalars
    covariance: Scalars

    @property
    def variance(self) -> Scalars:
        """The variance of each channel."""
        return self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)

    @property
    def varies(self) -> bool:
        """Whether the channels vary by more than the rounding of constants."""
        return bool(self.variance.sum() > CONSTANT**2 * np.square(self.mean).sum())

    def uncentred(self) -> Moments:
        """The moments about zero, by which a linear function without a constant is fitted.

        >>> Moments(np.array([1.0, 2.0]), np.eye(2)).uncentred().covariance
        array([[2., 2.],
               [2., 5.]])
        """
        squares = np.square(self.mean) if self.covariance.ndim == 1 else np.outer(self.mean, self.mean)
        return Moments(np.zeros_like(self.mean), self.covariance + squares)

    def arrays(self) -> Mapping[str, Any]:
        """The numbers in single precision, as named arrays."""
        return {"mean": self.mean.astype(np.float32), "covariance": self.covariance.astype(np.float32)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> Moments:
        """The moments that gave the `arrays`."""
        return cls(arrays["mean"].astype(np.float64), arrays["covariance"].astype(np.float64))


class MomentSums:
    """Sums over sampled rows of activations; a sample's number and the seed choose its rows, whatever its batch.

    >>> sums = MomentSums(seed=0)
    >>> sums.add(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), dim=1)
    >>> sums.moments().covariance
    array([[1., 0.],
           [0., 0.]])
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rows = 0
        self.origin: Tensor | None = None
        self.sums: Tensor | None = None
        self.products: Tensor | None = None
        self.waiting: list[Tensor] = []  # rows that are not in the products yet: few at a time cost as much as many

    def add(self, x: Tensor, dim: int, numbers: Tensor | None = None, *, batch: int = 0) -> None:
        """Add rows of activations with the channels along axis `dim`, chosen by the samples' `numbers` (samples,).

        The samples lie along axis 0. Where that is not known, `numbers` is None, and the number of the batch chooses.
        """
        x = x.detach().movedim(dim, -1)
        rows = _some_of_all(x, [self.seed, batch]) if numbers is None else _some_of_each(x, numbers, self.seed)
        rows = at_least_float32(rows)
        if self.origin is None:  # far from zero, squares would drown the covariance
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.sums = rows.sum(0).double() if self.sums is None else self.sums + rows.sum(0)
        self.rows += len(rows)
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= rows.shape[1] or rows.shape[1] > WIDEST:
            self.settle()

    def settle(self) -> None:
        """Add the products of the rows that wait."""
        if self.waiting:
            rows = torch.cat(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
            products = rows.T @ rows if rows.shape[1] <= WIDEST else rows.square().sum(0)
            if self.products is None:
                self.products = _in_file(len(products)) if _is_wide(products) else torch.zeros_like(products).double()
            self.products += products.to(self.products.device)
            self.waiting.clear()

    def state(self) -> dict[str, Tensor]:
        """The sums so far as named tensors; none before the first row."""
        waiting = torch.cat(self.waiting) if self.waiting else None
        found = {"origin": self.origin, "sums": self.sums, "products": self.products, "waiting": waiting}
        found["rows"] = torch.tensor(self.rows) if self.rows else None
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the sums that `state` gave, on a device."""
        self.rows = int(state.get("rows", 0))
        own = {name: tensor.to(device) for name, tensor in state.items()}
        self.origin, self.sums, self.products = (own.get(name) for name in ("origin", "sums", "products"))
        self.waiting = [own["waiting"]] if "waiting" in own else []

    def merge_ranks(self, channels: int) -> None:
        """Sum over all ranks, about the mean of all their rows."""
        rows = int(summed(torch.tensor(self.rows)))
        if not rows:
            return
        self.settle()
        place = self.products.device if self.products is not None else torch.device("cpu")
        nothing = torch.zeros(channels, dtype=torch.float64, device=place)
        origin = nothing if self.origin is None else self.origin.double()
        sums = nothing if self.sums is None else self.sums
        mean = summed(sums + self.rows * origin) / rows
        apart = mean - origin
        if channels > WIDEST:
            products = nothing if self.products is None else self.products
            moved = products - 2 * sums * apart + self.rows * apart.square()
        else:
            products = nothing.new_zeros(channels, channels) if self.products is None else self.products
            moved = products - (sums.outer(apart) + apart.outer(sums) - self.rows * apart.outer(apart)).to(products)
        self.rows, self.origin, self.sums, self.products = rows, mean, nothing, summed(moved)

    def moments(self) -> Moments:
        """The moments of all rows so far."""
        self.settle()
        if self.origin is None or self.sums is None or self.products is None:
            raise ValueError("nothing was added")
        mean = self.sums / self.rows
        out = _in_file(len(mean)) if _is_wide(self.products) else torch.empty_like(self.products)
        covariance = torch.div(self.products, self.rows, out=out)
        if covariance.ndim == 1:
            covariance -= mean.square()
        else:
            covariance.addr_(*[mean.to(covariance)] * 2, alpha=-1)
        found = Moments((mean + self.origin.double()).cpu().numpy(), covariance.cpu().numpy())
        return found if found.varies else replace(found, covariance=np.zeros_like(found.covariance))


def _is_wide(products: Tensor) -> bool:
    return products.ndim == 2 and len(products) > SINGLE


def _in_file(channels: int) -> Tensor:
    """Zeros (channels, channels) in a file that vanishes with them: memory may not hold those of all layers."""
    remedy = f": set TMPDIR to a folder with more room than {tempfile.gettempdir()}"
    with blaming("keeping a covariance", f"{channels:,} channels", remedy), tempfile.TemporaryFile() as file:
        file.truncate(size := 4 * channels**2)
        if hasattr(os, "posix_fallocate"):  # a full disk would end the process later
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(channels, channels)))


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in single precision at least."""
    return x if x.dtype == torch.float64 else x.float()


def _some_of_all(x: Tensor, seed: list[int]) -> Tensor:
    """Some rows (n, channels) of a tensor (..., channels)."""
    count, wanted = x[..., 0].numel(), max(BATCH_ROWS, 2 * x.shape[-1])
    if count <= wanted:
        return x.reshape(-1, x.shape[-1])
    chosen = torch.from_numpy(np.random.default_rng(seed).integers(count, size=wanted))
    return x[torch.unravel_index(chosen.to(x.device), x.shape[:-1])]


def _some_of_each(x: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """Some rows (n, channels) of every sample of a tensor (samples, ..., channels)."""
    places = x.shape[1:-1]
    count, wanted = places.numel(), max(ROWS, x.shape[-1] // 16)
    if count <= wanted:
        return x.reshape(-1, x.shape[-1])
    starts = torch.from_numpy((hashed(numbers.numpy(), seed) % np.uint64(count)).astype(np.int64))
    chosen = (starts[:, None] + torch.arange(wanted) * _stride(count)) % count
    order = torch.arange(len(x))[:, None].expand_as(chosen)
    where = tuple(index.to(x.device) for index in (order, *torch.unravel_index(chosen, places)))
    return x[where].flatten(0, 1)


@lru_cache(maxsize=256)
def _stride(count: int) -> int:
    """A step that visits all of so many places, evenly from the start: near the golden section."""
    return next(step for step in range(max(1, round(0.618 * count)), 2 * count) if math.gcd(step, count) == 1)


def hashed(numbers: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """A random number of 64 bits for each whole number, by a seed: the finalizer of SplitMix64.

    >>> hashed(np.array([0, 1]), 0) == hashed(np.array([0, 1]), 1)
    array([False, False])
    """
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64(seed * 0x632BE59BD9B4E019 + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
