"""R-Score: the first-order change of the loss when a unit goes (arXiv 2508.02291)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Through(torch.autograd.Function):
    """Hands `x` on; the gradient of `gate`, which stands at one along axis `dim`, is the sum of x * grad there.

    That is the derivative of the loss by a factor on each channel, and so the negative first-order effect of its
    removal; the product itself never has to be formed in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0], inner_products(x, grads[0], ctx.dim), None


def inner_products(x: Tensor, grad: Tensor, dim: int) -> Tensor:
    """The sum over all axes but `dim` of x * grad: shape (x.shape[dim],).

    >>> inner_products(torch.ones(2, 3), torch.full((2, 3), 2.0), 1)
    tensor([4., 4., 4.])
    """
    x, grad = (t.movedim(dim, -1) if t.ndim < 3 else t.movedim(dim, 1) for t in (x, grad))
    if x.ndim < 3:
        return (x * grad).reshape(-1, x.shape[-1]).sum(0)
    products: Tensor = torch.linalg.vecdot(x.flatten(2), grad.flatten(2))  # the product itself is never formed
    return products.sum(0)
