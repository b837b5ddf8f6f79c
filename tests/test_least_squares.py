"""The regularised fit of one layer, against numpy and by what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxprune.recovery.compensation.least_squares import STRENGTHS, Normal, Rectified, Rows, error_of, refitted


def problem(n: int = 400, features: int = 6, outputs: int = 3, noise: float = 0.1) -> tuple[Rows, Tensor, Tensor]:
    """Rows of a noisy affine map in one group, and what the map is."""
    x = torch.randn(1, n, features, dtype=torch.float64) + 2
    weight, bias = torch.randn(1, outputs, features).double(), torch.randn(1, outputs).double()
    wanted = x @ weight.transpose(1, 2) + bias[:, None] + noise * torch.randn(1, n, outputs)
    return Rows(x, wanted, torch.arange(n) % 5 == 4), weight, bias


def test_without_a_ridge_it_is_least_squares() -> None:
    rows, weight, bias = problem()
    fit = refitted(rows, torch.zeros_like(weight), torch.zeros_like(bias), strengths=[1e-12])
    x = np.hstack([rows.inputs[0].numpy(), np.ones((rows.inputs.shape[1], 1))])
    expected = np.linalg.lstsq(x, rows.wanted[0].numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.weight[0].numpy(), expected[:-1].T, atol=1e-8)
    np.testing.assert_allclose(fit.bias[0].numpy(), expected[-1], atol=1e-8)


def test_a_strong_ridge_stays_at_the_weights_given() -> None:
    rows, weight, bias = problem()
    start = weight + 0.1
    fit = refitted(rows, start, bias, strengths=[1e6])
    torch.testing.assert_close(fit.weight, start, atol=1e-4, rtol=0)
    centred = rows.wanted - rows.inputs @ fit.weight.transpose(1, 2)
    torch.testing.assert_close(fit.bias, centred.mean(1), atol=1e-6, rtol=0)  # the bias is not pulled


def test_groups_are_fitted_apart() -> None:
    (a, w, b), (c, v, d) = problem(), problem()
    both = Rows(torch.cat([a.inputs, c.inputs]), torch.cat([a.wanted, c.wanted]), a.held)
    together = refitted(both, torch.cat([w, v]) + 1, torch.cat([b, d]), strengths=[0.01])
    alone = refitted(c, v + 1, d, strengths=[0.01])
    torch.testing.assert_close(together.weight[1:], alone.weight)


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_help_on_what_is_held_out_is_not_kept(seed: int) -> None:
    torch.manual_seed(seed)
    rows, weight, bias = problem(n=20, features=12, noise=0)
    rows = Rows(rows.inputs, rows.wanted + torch.randn_like(rows.wanted), rows.held)
    fit = refitted(rows, weight, bias)
    assert fit.after <= fit.before
    assert fit.before == error_of(rows.part(rows.held), weight, bias)
    if fit.strength is None:
        assert fit.weight is weight


def test_inputs_that_are_not_finite_leave_the_weights() -> None:
    rows, weight, bias = problem()
    rows.inputs[0, 0, 0] = torch.inf
    fit = refitted(rows, weight, bias)
    assert fit.strength is None
    assert fit.weight is weight


def test_a_covariance_that_rounding_made_indefinite_gives_no_weights() -> None:
    """Covariances in float32 of inputs with a large mean, in few directions: the weakest ridge cannot mend them."""
    mean = 3 * torch.rand(256)
    inputs = (0.05 * torch.randn(1, 400, 8) @ torch.randn(8, 256) + mean).float()
    weight, bias = torch.randn(1, 4, 256).double(), torch.zeros(1, 4, dtype=torch.float64)
    normal = Normal.of(inputs, inputs[..., :4], intercept=False)
    assert float(torch.linalg.eigvalsh(normal.covariance).min()) < -STRENGTHS[0] * float(normal.covariance.mean())
    assert not normal.solve(weight, bias, STRENGTHS[0])[0].isfinite().all()
    assert normal.solve(weight, bias, STRENGTHS[1])[0].isfinite().all()


def test_behind_a_rectifier_only_what_passes_counts() -> None:
    """The wanted values are far below zero on half the rows, where a linear fit would bend to reach them."""
    rows, weight, bias = problem(noise=0)
    below = rows.wanted < rows.wanted.median(1, keepdim=True).values
    wanted = torch.where(below, rows.wanted - 20, rows.wanted)
    shift = -rows.wanted.median(1, keepdim=True).values
    one = torch.ones_like(wanted[:, :1])
    bent = Rows(rows.inputs, wanted, rows.held)

    def error(rectified: Rectified | None) -> float:
        fit = refitted(bent, torch.zeros_like(weight), bias, rectified=rectified)
        found = rows.inputs @ fit.weight.transpose(1, 2) + fit.bias[:, None]
        return float(((found + shift).relu() - (wanted + shift).relu()).square().mean())

    assert error(Rectified(one, shift.expand_as(one))) < 0.7 * error(None)
