"""Random small graphs under random plans: zeroing a unit equals deleting it."""

from __future__ import annotations

import torch
from helpers import difference, outputs, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import SIZE, RandomNet, nets

import fxprune


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


@settings(max_examples=300)
@given(net=nets(), seed=st.integers(0, 100), alpha=st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_zeroing_equals_deleting(net: RandomNet, seed: int, alpha: float) -> None:
    graph = fxprune.capture(net, image())
    plan = fxprune.Scores.random(graph, image(), seed=seed).plan(alpha=alpha)
    small = fxprune.apply(net, plan)
    assert fxprune.verify(net, plan, small, image(3)) < 1e-9
    assert parameters(small) <= parameters(net)


@settings(max_examples=60)
@given(net=nets())
def test_the_captured_graph_computes_the_same(net: RandomNet) -> None:
    assert difference(outputs(net, image()), outputs(fxprune.capture(net, image()), image())) == 0
