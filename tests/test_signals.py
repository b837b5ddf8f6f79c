"""The U-Score against scipy, the R-Score against finite differences of the loss in the gate."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.scoring.signals.diameter import FEW, diameter
from fxprune.scoring.signals.separability import directions, separability
from fxprune.scoring.signals.table import magnitudes
from fxprune.scoring.signals.taylor import inner_products


def plain_separability(samples: Tensor, classes: Tensor) -> list[float]:
    """The largest pairwise distance, with scipy's W1 averaged over the projections."""
    present = classes.unique().tolist()
    scores = []
    for unit in range(samples.shape[1]):
        distances = [0.0]
        for one, two in combinations(present, 2):
            pairs = zip(samples[classes == one, unit].T, samples[classes == two, unit].T, strict=True)
            distances.append(float(np.mean([wasserstein_distance(u.numpy(), v.numpy()) for u, v in pairs])))
        scores.append(max(distances))
    return scores


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_u_score_is_the_largest_wasserstein_distance(sizes: list[int], units: int, projections: int, seed: int) -> None:
    """Classes of any sizes, in any order."""
    torch.manual_seed(seed)
    classes = torch.repeat_interleave(torch.arange(len(sizes)) * 7, torch.tensor(sizes))
    classes = classes[torch.randperm(len(classes))]
    samples = torch.randn(len(classes), units, projections, dtype=torch.float64).round(decimals=1)
    assert separability(samples, classes).tolist() == pytest.approx(plain_separability(samples, classes), abs=1e-9)


@pytest.mark.wide
def test_u_score_of_a_hundred_classes() -> None:
    classes = torch.arange(330) % 100
    samples = torch.randn(330, 3, 2, dtype=torch.float64)
    assert separability(samples, classes).tolist() == pytest.approx(plain_separability(samples, classes), abs=1e-9)


@given(st.integers(FEW + 1, 3 * FEW), st.integers(1, 6), st.sampled_from(["normal", "ties", "far", "same"]))
def test_the_diameter_of_many_points(count: int, size: int, kind: str) -> None:
    """As large as that of all pairs, which scipy compares."""
    points = torch.randn(3, count, size, dtype=torch.float64)
    if kind == "ties":
        points = points.round()
    elif kind == "far":
        points[:, ::7] *= 1e6
    elif kind == "same":
        points[:] = points[:, :1]
    expected = [float(pdist(unit.numpy(), "cityblock").max()) for unit in points]
    assert diameter(points).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_u_score_does_not_depend_on_the_order_of_samples_or_names_of_classes() -> None:
    samples, classes = torch.randn(40, 5, 3, dtype=torch.float64), torch.arange(40) % 4
    order = torch.randperm(40)
    expected = separability(samples, classes)
    assert torch.allclose(separability(samples[order], classes[order]), expected)
    assert torch.allclose(separability(samples, torch.tensor([5, -3, 100, 8])[classes]), expected)


def test_u_score_scales_and_ignores_shifts() -> None:
    samples, classes = torch.randn(30, 4, 2, dtype=torch.float64), torch.arange(30) % 3
    assert torch.allclose(separability(3 * samples + 5, classes), 3 * separability(samples, classes))


def test_constant_unit_and_single_class_score_zero() -> None:
    samples = torch.randn(12, 2, 1)
    samples[:, 0] = 2.5
    assert separability(samples, torch.arange(12) % 3)[0] == 0
    assert separability(samples, torch.zeros(12, dtype=torch.long)).tolist() == [0, 0]


def test_directions_are_unit_vectors_and_repeatable() -> None:
    first, again, other = (directions(50, 16, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (50, 16)
    assert torch.allclose(first.norm(dim=0), torch.ones(16))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scalar_activations_are_not_projected() -> None:
    assert directions(1, 64, seed=0).tolist() == [[1.0]]


PRODUCTS = {  # the axes of channels and samples, places of a sample, and the same as an einsum of (3, 4, 5, 6)
    "all samples": (1, None, 1, "abcd,abcd->b"),
    "all samples, channels last": (3, None, 1, "abcd,abcd->d"),
    "no axis but that of the channels": (0, 0, 1, "abcd,abcd->a"),
    "by sample": (1, 0, 1, "abcd,abcd->ab"),
    "by sample, channels last": (3, 0, 1, "abcd,abcd->ad"),
    "by sample, channels first": (0, 1, 1, "abcd,abcd->ba"),
    "by sample, two places each": (0, 1, 2, "apqcd,apqcd->pa"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_inner_products_sum_over_all_other_axes(name: str) -> None:
    dim, samples, times, letters = PRODUCTS[name]
    x, grad = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = torch.einsum(letters, *((t.unflatten(1, (2, 2)) for t in (x, grad)) if times > 1 else (x, grad)))
    found = inner_products(x, grad, dim, samples, times)
    assert found.shape == (expected.shape if expected.ndim == 2 else (1, *expected.shape))
    assert torch.allclose(found, expected.reshape(found.shape))


class WithTokens(nn.Module):
    """Puts learned rows in front of its input; here there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 0, 6))
        self.lift, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.tokens.expand(len(x), -1, -1), self.lift(x)], 1)
        found: Tensor = self.head(rows.relu().mean(1))
        return found


def test_parameters_without_entries_have_no_magnitude() -> None:
    graph = fxprune.capture(model := WithTokens().eval(), torch.zeros(2, 5, 4))
    lift, head = (layer.weight.detach().double() for layer in (model.lift, model.head))
    squares = lift.square().sum(1) + model.lift.bias.detach().double().square() + head.square().sum(0)
    np.testing.assert_allclose(magnitudes(graph, analyse(graph)), squares.sqrt().numpy())
