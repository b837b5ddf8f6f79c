"""The pipeline as a whole: its options, its modes, and what it says when there is nothing to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cifar
import pytest
import torch
from helpers import difference, outputs, parameters, width
from nets import layers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from zoo import ZOO, images, tensors

import fxprune
from fxprune.errors import FxpruneWarning, PlanError

BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5), (images()(1), torch.tensor([3]))]


def compress(model: nn.Module, batches: Any = BATCHES, *args: Any, **options: Any) -> Any:
    return fxprune.compress(model, batches, *args, progress=False, **options)


def test_stages_can_be_saved_between(tmp_path: Path) -> None:
    model = ZOO["residual"].build().eval()
    fxprune.score(model, BATCHES, progress=False).save(tmp_path / "scores")
    fxprune.Scores.load(tmp_path / "scores").plan(alpha=0.3).save(tmp_path / "plan")
    small = fxprune.apply(ZOO["residual"].build().eval(), fxprune.Plan.load(tmp_path / "plan"))
    at_once = compress(model, BATCHES, 0.3, compensate="none")
    assert difference(outputs(small, images()(3)), outputs(at_once, images()(3))) == 0


def test_options_reach_their_stages() -> None:
    model = ZOO["residual"].build()
    small = compress(model, BATCHES, 1.0, exclude=["a.conv1"], min_keep=3, round_to=2, seed=4, samples_per_class=2)
    assert [width(small, name) for name in ("stem", "a.conv1", "b.conv1", "down.0")] == [4, 8, 4, 4]


def test_a_model_of_several_inputs_and_an_unpack() -> None:
    batches = [{"pair": (images()(10), tensors(6)(10)), "y": torch.arange(10) % 5}]
    small = compress(ZOO["several_inputs"].build(), batches, 0.5, unpack=lambda b: (b["pair"], b["y"]))
    assert small(images()(3), tensors(6)(3)).shape == (3, 5)


def test_a_single_layer_has_nothing_to_prune() -> None:
    with pytest.warns(FxpruneWarning, match=r"nothing in Sequential can be pruned: '1': it is the model's output"):
        small = compress(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    assert parameters(small) == 192 * 5 + 5


def test_an_alpha_that_removes_nothing_is_said() -> None:
    """Two units whose scores agree the wrong way round: the lower U-Score is the higher R-Score."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([[9.0, 1.0], [-9.0, -1.0]]))
    batches = [(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([0, 0, 1, 1]))]
    with pytest.warns(FxpruneWarning, match="nothing was pruned from Sequential at alpha 0.0: .* raise alpha"):
        small = compress(model, batches, 0.0, propose="separability", allocate="tod-by-group")
    assert parameters(small) == parameters(model)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fxprune.compress(ZOO["residual"].build(), BATCHES)
    assert capsys.readouterr().out == ""


@pytest.mark.wide
def test_the_scores_find_what_a_real_network_can_miss(data: Path) -> None:
    """ResNet-20 on CIFAR-10, inner channels of the blocks, 400 images, no training: worst first is chance."""
    model = cifar.load(cifar.resnet20, data)
    x, y = cifar.images(data, "train", 400)
    test, labels = cifar.images(data, "test", 400)
    batches = list(zip(x.split(100), y.split(100), strict=True))
    scores = fxprune.score(model, batches, exclude=["conv1", "*.conv2"], progress=False)
    reversed_scores = dataclasses.replace(scores, propose=-scores.propose, protect=-scores.protect)

    def accuracy(network: nn.Module) -> float:
        return float((outputs(network, test)[0].argmax(1) == labels).float().mean())

    good, bad = (fxprune.apply(model, s.plan(macs=0.8)) for s in (scores, reversed_scores))
    assert accuracy(model) > 0.84
    assert fxprune.report(good).macs_after <= 0.8 * fxprune.report(good).macs_before
    assert accuracy(good) > 0.75
    assert accuracy(bad) < 0.2


def test_it_is_its_stages_in_their_order() -> None:
    model = ZOO["residual"].build().eval()
    scores = fxprune.score(model, BATCHES, progress=False)
    plan = scores.plan(alpha=0.3)
    by_hand = fxprune.apply(model, plan, scores=scores, loader=BATCHES, compensate="sequential")
    assert difference(outputs(by_hand, images()(3)), outputs(compress(model, BATCHES, 0.3), images()(3))) == 0


def test_a_model_without_channels_has_nothing_to_prune() -> None:
    @layers(lambda: dict(scale=nn.Parameter(torch.ones(()))))
    def Plain(self, x):
        return x.mean((2, 3)).repeat(1, 2)[:, :5] * self.scale

    with pytest.warns(FxpruneWarning, match="nothing in Plain can be pruned: it has no layers with channels"):
        compress(Plain())


def test_everything_excluded_is_said() -> None:
    with pytest.warns(FxpruneWarning, match="nothing in Residual can be pruned: .*excluded by the caller"):
        compress(ZOO["residual"].build(), exclude=["*"])


@pytest.mark.parametrize("budget", ["params", "macs", "latency"])
def test_a_budget_on_a_model_of_which_nothing_can_be_pruned_says_why(budget: str) -> None:
    with pytest.raises(
        PlanError, match=f"{budget}=0.6 asks for 60.0% of the .*, but nothing in the model can be pruned: "
    ) as e:
        compress(ZOO["residual"].build(), exclude=["*"], **{budget: 0.6})
    assert "'stem', 'a.conv2', 'a.conv1' and 4 more: excluded by the caller" in str(e.value)


def test_a_budget_names_layers_whose_weights_are_computed() -> None:
    model = nn.Sequential(nn.Flatten(), *(weight_norm(nn.Linear(192, 192)) for _ in range(2)), nn.Linear(192, 5))
    model[3] = weight_norm(model[3])
    with pytest.raises(PlanError, match=r"'1': its weight is computed by torch.nn.utils.parametrize; torch.nn.utils.p"):
        compress(model, macs=0.6)


def test_a_budget_names_the_operations_without_a_rule() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(torch.special.bessel_j0(self.first(x.flatten(1))))

    with pytest.raises(
        PlanError, match=r"nothing in the model can be pruned: 'first': no rule for function .*bessel_j0"
    ):
        compress(Unknown(), macs=0.6, unknown="freeze")
