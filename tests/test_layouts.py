"""Layouts: scores do not depend on how what reads a norm lays out its gradient in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import part_of, squares
from torch import Tensor, nn
from zoo import randomise

import fxprune
from fxprune.scoring.eval_graph import laid_out

PLANES = (0, 2, 3, 1), (2, 3, 0, 1), (2, 0, 3, 1), (3, 1, 2, 0)  # orders of the axes, from the outermost in memory
VOLUMES = (0, 2, 3, 4, 1), (2, 3, 4, 0, 1), (4, 0, 2, 1, 3)


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers in memory so that the first axis of `order` is the outermost, and the last the innermost."""
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])


class Spelled(nn.Module):
    """A norm in operations of one number each."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        own, axes = self.norm, tuple(range(2, x.ndim))
        mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        if own.running_mean is not None:
            mean, var = (t.view(-1, *[1] * len(axes)) for t in (own.running_mean, own.running_var))
        scale, shift = (t.view(-1, *[1] * len(axes)) for t in (own.weight, own.bias))
        return (x - mean) / (var + own.eps).sqrt() * scale + shift


class Functional(nn.Module):
    """A norm as a function."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm
        if own.running_mean is None:
            return F.instance_norm(x, None, None, own.weight, own.bias, True, 0.1, own.eps)
        return F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, False, 0.1, own.eps)


class Net(nn.Module):
    """A norm between layers that are scored, whose gradient is laid out in an order of the axes."""

    def __init__(self, norm: nn.Module, order: tuple[int, ...]) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = nn.Conv2d if len(order) == 4 else nn.Conv3d
        self.first, self.second, self.norm = conv(3, 6, 3), conv(6, 8, 3), norm
        self.head, self.order = nn.Linear(8, 4), order

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(x).relu()).tanh())
        x = x.permute(self.order).contiguous().tanh()  # its gradient comes back contiguous in this order
        x = x.square().permute([self.order.index(axis) for axis in range(x.ndim)])
        return self.head(x.flatten(2).logsumexp(2))


def protect(norm: nn.Module, order: tuple[int, ...], batch: int) -> np.ndarray:
    """The R-Scores of a network with a norm."""
    torch.manual_seed(0)
    model = randomise(Net(norm, order)).double().eval()
    x = torch.randn(2 * batch, 3, *[7] * (len(order) - 2), dtype=torch.float64)
    loader = [(part, torch.arange(len(part))) for part in x.split(batch)]
    return fxprune.score(model, loader, squares, progress=False).protect


CASES = [
    (kind, batch, order)
    for kinds, orders in (
        ((nn.BatchNorm2d, nn.InstanceNorm2d), PLANES),
        ((nn.BatchNorm3d, nn.InstanceNorm3d), VOLUMES),
    )
    for kind, batch, order in itertools.product(kinds, (1, 5), orders)
]


@pytest.mark.parametrize("form", [lambda norm: norm, Functional], ids=["module", "function"])
@pytest.mark.parametrize(("kind", "batch", "order"), part_of(CASES, 6))
def test_scores_do_not_depend_on_the_layout(form: Any, kind: Any, batch: int, order: tuple[int, ...]) -> None:
    made, spelled = (randomise(kind(8, affine=True)) for _ in range(2))
    found = protect(form(made), order, batch)
    wanted = protect(Spelled(spelled), order, batch)
    assert found.max() > 0
    np.testing.assert_allclose(found, wanted, atol=1e-9 * wanted.max())


@pytest.mark.parametrize("order", PLANES)
def test_a_gradient_is_laid_out_as_the_value(order: tuple[int, ...]) -> None:
    x, given = (torch.randn(2, 3, 4, 5) for _ in range(2))
    y = in_order(x, order).requires_grad_() * 1
    assert laid_out(y) is y
    (found,) = torch.autograd.grad(2 * y, y, in_order(given, (3, 2, 1, 0)))
    assert torch.equal(found, 2 * given)
    assert found.stride() == y.stride()


class NoGradient(torch.autograd.Function):
    """Hands a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def test_there_may_be_no_gradient() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = laid_out(F.instance_norm(x))
    (found,) = torch.autograd.grad(NoGradient.apply(y).sum() + x.sum(), x)
    assert torch.equal(found, torch.ones_like(x))
