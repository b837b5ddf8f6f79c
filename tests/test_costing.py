"""What a plan costs, foretold, against what the rewritten model costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from helpers import parameters, part_of
from nets import layers
from torch import Tensor, nn
from zoo import ZOO, images, randomise

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.planning.costs import costs_of
from fxprune.planning.plan import kept_units
from fxprune.rewriting.rewrite import rewrite
from fxprune.tracing.facts import macs
from fxprune.tracing.graph import example_of

NETWORKS = [
    ("shufflenet_v2_x0_5", {}, 32),
    ("vit_b_32", {"image_size": 64}, 64),
    ("swin_t", {}, 64),
]


def check(graph: Any, options: dict[str, bool], alphas: tuple[float, ...]) -> None:
    """Random plans cost what was foretold, and every node's work was understood."""
    coupling = analyse(graph, **options)
    costs = costs_of(graph, coupling)
    assert costs.inexact == ()
    scores = fxprune.Scores.random(graph, example_of(graph), seed=3, **options)
    everything = np.ones(coupling.units, dtype=bool)
    assert costs.parameters(everything) == parameters(graph)
    assert costs.macs(everything) == macs(graph, example_of(graph))
    for alpha in alphas:
        keep = kept_units(scores.plan(alpha), coupling)
        small = rewrite(graph, coupling, keep)
        assert costs.parameters(keep) == parameters(small)
        assert costs.macs(keep) == macs(small, example_of(graph))


@pytest.mark.parametrize(("name", "options", "size"), part_of(NETWORKS, 4))
def test_torchvision_costs_what_was_foretold(name: str, options: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None, **options)).eval()
    check(fxprune.capture(model, images(size=size)(2)), {"inexact": True}, (0.5, 1.0))


@layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(6, 8), weight=nn.Parameter(torch.randn(8, 5))))
def OfThree(self, x: Tensor) -> Tensor:
    """One einsum of three operands, whose work depends on the order in which torch takes them."""
    return torch.einsum("bi,bi,io->bo", self.a(x), self.b(x), self.weight)


def test_work_without_a_formula_is_named() -> None:
    scores = fxprune.Scores.random(OfThree(), torch.randn(2, 6))
    assert scores.costs is not None
    assert scores.costs.inexact == ("einsum",)
    with pytest.warns(fxprune.FxpruneWarning, match="the MACs of einsum count as if no plan changed them"):
        plan = scores.plan(macs=0.7)
    assert plan.budget is not None


def test_costs_are_saved_with_the_scores(tmp_path: Any) -> None:
    case = ZOO["attention_permute_einsum"]
    scores = fxprune.Scores.random(case.build(), case.example(2), head_dim=True)
    scores.save(tmp_path / "scores.npz")
    loaded = fxprune.Scores.load(tmp_path / "scores.npz")
    assert loaded.costs is not None
    assert scores.costs is not None
    rng = np.random.default_rng(0)
    for _ in range(20):
        keep = rng.random(len(scores.propose)) < 0.5
        assert loaded.costs.macs(keep) == scores.costs.macs(keep)
        assert loaded.costs.parameters(keep) == scores.costs.parameters(keep)
    assert loaded.plan(macs=0.8) == scores.plan(macs=0.8)
    without = dataclasses.replace(scores, costs=None)
    with pytest.raises(fxprune.PlanError, match="params is given, but these scores hold no costs of the model"):
        without.plan(params=0.5)
