"""R-Score: the first-order change of the loss when a unit is removed (arXiv 2508.02291)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Through(torch.autograd.Function):
    """The identity on `x`; the gradient of `gate`, one for each channel along axis `dim`, is the sum of x * grad.

    That is the derivative of the loss by a factor on each channel, the negative first-order effect of its removal,
    without a product in the forward pass. Behind the channels, `gate` has one entry for each unit, whose gradient is
    the sum of the sizes of each sample's derivative. `units` (channels,) are the units of the channels, the number
    behind the last for none; None where each channel is a unit. `samples` is the axis of the samples, in `times`
    consecutive places each; None takes all for one sample.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, dim: int, units: Tensor | None, samples: int | None, times: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.where, ctx.units, ctx.count = (dim, samples, times), units, len(gate) - x.shape[dim]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        products = by_unit = inner_products(x, grads[0], *ctx.where)
        if ctx.units is not None:
            nothing = products.new_zeros(len(products), ctx.count + 1)
            by_unit = nothing.index_add(1, ctx.units.to(products.device), products)[:, :-1]
        return grads[0], torch.cat([products.sum(0), by_unit.abs().sum(0)]), None, None, None, None


def inner_products(x: Tensor, grad: Tensor, dim: int, samples: int | None = None, times: int = 1) -> Tensor:
    """The sum of x * grad over all axes but `dim`, for each sample: (samples, x.shape[dim]).

    >>> inner_products(torch.ones(2, 3), torch.full((2, 3), 2.0), 1)
    tensor([[4., 4., 4.]])
    >>> inner_products(torch.ones(2, 3), torch.full((2, 3), 2.0), 1, samples=0)
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    x, grad = (_channels_second(t, dim, samples, times).flatten(2) for t in (x, grad))
    products: Tensor = torch.linalg.vecdot(x, grad)  # holds no product in memory
    return products


def _channels_second(x: Tensor, dim: int, samples: int | None, times: int) -> Tensor:
    """The tensor as (samples, channels, times, ...)."""
    if samples is None or samples == dim:
        return x.movedim(dim, 0).unsqueeze(0).unsqueeze(2)
    placed: Tensor = x.movedim((samples, dim), (0, 1)).unflatten(0, (-1, times))
    return placed.movedim(1, 2)
