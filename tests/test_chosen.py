"""Channels of the caller's choice: plans from kept channels, plans without some more, and ratios by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from command_line import done, flat, invoke
from nets import layers
from torch import Tensor, nn

import fxprune
from fxprune.errors import PlanError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@layers(lambda: dict(
    stem=nn.Conv2d(3, 8, 3, padding=1), conv1=nn.Conv2d(8, 6, 3, padding=1), bn1=nn.BatchNorm2d(6),
    conv2=nn.Conv2d(6, 8, 3, padding=1), bn2=nn.BatchNorm2d(8), head=nn.Linear(8, 5),
))  # fmt: skip
def Residual(self, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
    return self.head(x.mean((2, 3)))


@layers(lambda: dict(attention=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 5)))
def Attention(self, x: Tensor) -> Tensor:
    return self.head(self.attention(x, x, x)[0].mean(1))


@layers(lambda: dict(rnn=nn.LSTM(4, 6, num_layers=2, batch_first=True), head=nn.Linear(6, 3)))
def Recurrent(self, x: Tensor) -> Tensor:
    return self.head(self.rnn(x)[0][:, -1])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Residual().eval()


def masked(model: Any, x: Tensor, stem: list[int], conv1: list[int]) -> Tensor:
    """The output of a `Residual` whose channels are multiplied by masks of ones at the kept ones."""
    outer, inner = torch.zeros(8, 1, 1), torch.zeros(6, 1, 1)
    outer[stem], inner[conv1] = 1, 1
    x = model.stem(x).relu() * outer
    y = model.bn1(model.conv1(x)).relu() * inner
    x = (x + model.bn2(model.conv2(y))).relu() * outer
    return model.head(x.mean((2, 3)))


# -- from_kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [list, tuple, set, np.array, torch.tensor, reversed])
def test_from_kept_is_the_mask_made_by_hand(model: nn.Module, as_given: Callable[[Any], Any]) -> None:
    plan = fxprune.Plan.from_kept(model, IMAGES, {"stem": as_given([0, 2, 3, 7]), "conv1": as_given([1, 4])})
    assert plan.keep == {
        "stem": (0, 2, 3, 7), "conv1": (1, 4), "conv2": (0, 2, 3, 7), "head": (0, 1, 2, 3, 4),
    }  # fmt: skip
    small = fxprune.apply(model, plan)
    assert small.stem.weight.shape == (4, 3, 3, 3)
    assert small.conv1.weight.shape == (2, 4, 3, 3)
    assert torch.allclose(small(IMAGES), masked(model, IMAGES, [0, 2, 3, 7], [1, 4]), atol=1e-5)
    assert fxprune.verify(model, plan, small, IMAGES) < 1e-5


def test_from_kept_travels_as_any_plan(model: nn.Module, tmp_path: Any) -> None:
    plan = fxprune.Plan.from_kept(model, IMAGES, {"conv1": [1, 4]}, exclude="stem")
    plan.save(tmp_path / "plan.json")
    assert fxprune.Plan.load(tmp_path / "plan.json") == plan
    assert plan.frozen["excluded by the caller"] == ("stem", "conv2")
    assert (plan.alpha, plan.budget, plan.allocate) == (None, None, None)


def test_from_kept_takes_layers_of_a_part(model: nn.Module) -> None:
    whole = nn.Sequential(nn.Identity(), model)
    plan = fxprune.Plan.from_kept(whole, IMAGES, {"conv1": [0]}, submodule="1")
    assert fxprune.apply(whole, plan)[1].conv1.weight.shape == (1, 8, 3, 3)


def test_from_kept_of_coupled_layers_that_agree(model: nn.Module) -> None:
    plan = fxprune.Plan.from_kept(model, IMAGES, {"stem": [0, 1], "conv2": [1, 0]})
    assert plan.keep["stem"] == plan.keep["conv2"] == (0, 1)


@pytest.mark.parametrize(("kept", "message"), [
    ({"stem": [0, 1], "conv2": [0, 2]}, "keeps channel 1 of 'stem' but drops channel 1 of 'conv2', which must be kept "
     r"or removed together .*: keep both or drop both"),
    ({"head": [0, 1]}, "drops channel 2 of 'head' .2 of 5 kept., which cannot be removed .it is the model's"),
    ({"conv1": []}, "keeps 0 of 6 channels of 'conv1': a layer keeps at least one"),
    ({"conv9": [0]}, "kept: no layer that produces channels is called 'conv9'; close names: 'conv2', 'conv1'; "
     "fxprune.couple lists them all"),
    ({"bn1": [0]}, "kept: 'bn1' has the channels of the layer before it: name 'conv1'$"),
    ({"conv1": [0, 4, 2, 4, 0]}, "kept: the channels of 'conv1' name 0, 4 more than once; give each once"),
    ({"conv1": [0, 6]}, "kept: 6 is no channel of 'conv1', which has 6: give indices from 0 to 5"),
    ({"conv1": [-1]}, "kept: -1 is no channel of 'conv1'"),
    ({"conv1": [0.5]}, "kept: 0.5 is no channel of 'conv1'"),
    ({"conv1": np.ones(6, dtype=bool)}, "kept: the channels of 'conv1' are a mask .* mask.nonzero"),
    ({"conv1": 3}, "kept: the channels of 'conv1' are 3; give a list of indices"),
    ({"conv1": "012"}, "kept: the channels of 'conv1' are '012'; give a list of indices"),
    ([("conv1", [0])], "kept is .*; it is a dict of layers and the channels to keep, such as"),
])  # fmt: skip
def test_from_kept_refuses(model: nn.Module, kept: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxprune.Plan.from_kept(model, IMAGES, kept)


def test_a_contradiction_names_the_layers_that_were_given() -> None:
    model, image = torchvision.models.resnet18().eval(), torch.zeros(2, 3, 32, 32)
    kept = {"layer1.0.conv2": range(12), "layer1.1.conv2": range(10)}  # 'conv1' is coupled to both
    with pytest.raises(PlanError, match=r"keeps channel 10 of 'layer1.0.conv2' but drops channel 10 of 'layer1.1.con"):
        fxprune.Plan.from_kept(model, image, kept)


def test_heads_are_kept_or_removed_whole() -> None:
    model, x = Attention().eval(), torch.randn(2, 3, 8)
    site = next(site.name for site in fxprune.couple(fxprune.capture(model, x))[0].sites)
    width = fxprune.Plan.from_kept(model, x, {}).widths[site]
    with pytest.raises(PlanError, match=r"keeps channel \d+ of 'attention.* must be kept or removed together"):
        fxprune.Plan.from_kept(model, x, {site: range(1, width)})


def test_layers_of_one_size_keep_the_same_number() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 3, 4)
    balanced = fxprune.Scores.random(model, x).balanced[0]
    one, other = balanced[:2]
    with pytest.raises(PlanError, match=f"keeps 3 of 6 units of '{one}' but 6 of 6 units of '{other}', which share one "
                       "size: keep the same number of each"):  # fmt: skip
        fxprune.Plan.from_kept(model, x, {one: [0, 1, 2]})
    plan = fxprune.Plan.from_kept(model, x, {one: [0, 1, 2], other: [3, 4, 5]})
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, x) < 1e-5
    again = fxprune.Plan.from_kept(model, x, {}).without(model, {one: [3, 4, 5], other: [0, 1, 2]})
    assert again.keep == plan.keep


# -- without -----------------------------------------------------------------------------------------------------------


def test_without_removes_the_same_unit_of_every_coupled_layer(model: nn.Module) -> None:
    plan = fxprune.Plan.from_kept(model, IMAGES, {"conv1": [0, 1, 2, 3]})
    fewer = plan.without(model, {"conv1": [3], "conv2": [5]})
    assert fewer.keep["conv1"] == (0, 1, 2)
    assert fewer.keep["stem"] == fewer.keep["conv2"] == (0, 1, 2, 3, 4, 6, 7)
    assert plan.keep["stem"] == tuple(range(8))
    small = fxprune.apply(model, fewer)
    assert torch.allclose(small(IMAGES), masked(model, IMAGES, [0, 1, 2, 3, 4, 6, 7], [0, 1, 2]), atol=1e-5)


def test_without_joins_what_coupled_layers_lose(model: nn.Module) -> None:
    fewer = fxprune.Plan.from_kept(model, IMAGES, {}).without(model, {"stem": [1], "conv2": [2]})
    assert fewer.keep["stem"] == fewer.keep["conv2"] == (0, 3, 4, 5, 6, 7)
    assert fewer.without(model, {"stem": [1]}) == fewer


def test_without_forgets_what_the_plan_was_asked_for(model: nn.Module) -> None:
    plan = fxprune.Scores.random(model, IMAGES).plan(macs=0.7)
    kept = plan.keep["conv1"][0]
    fewer = plan.without(model, {"conv1": [kept]})
    assert kept not in fewer.keep["conv1"]
    assert plan.budget is not None
    assert (fewer.alpha, fewer.budget, fewer.allocate) == (None, None, None)


@pytest.mark.parametrize(("removed", "message"), [
    ({"conv1": range(6)}, "keeps 0 of 6 channels of 'conv1': a layer keeps at least one"),
    ({"head": [1]}, r"drops channel 1 of 'head' \(4 of 5 kept\), which cannot be removed \(it is the model's output\)"),
    ({"conv3": [1]}, "removed: no layer that produces channels is called 'conv3'; close names: "),
    ({"conv1": [7]}, "removed: 7 is no channel of 'conv1', which has 6"),
    ({"conv1": 1}, "removed: the channels of 'conv1' are 1; give a list of indices"),
    ("conv1", "removed is 'conv1'; it is a dict of layers and the channels to remove"),
])  # fmt: skip
def test_without_refuses(model: nn.Module, removed: Any, message: str) -> None:
    plan = fxprune.Plan.from_kept(model, IMAGES, {})
    with pytest.raises(PlanError, match=message):
        plan.without(model, removed)


def test_without_is_for_the_model_of_the_plan(model: nn.Module) -> None:
    plan = fxprune.Plan.from_kept(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 3), {})
    with pytest.raises(PlanError, match="the plan names '0', which has no channels there"):
        plan.without(nn.Sequential(nn.Identity(), nn.Linear(3, 4)), {"1": [0]})


# -- ratios ------------------------------------------------------------------------------------------------------------


def widths(plan: fxprune.Plan) -> dict[str, int]:
    return {layer: len(kept) for layer, kept in plan.keep.items()}


@pytest.mark.parametrize(("ratios", "kept"), [
    ({"conv1": 0.5}, {"stem": 8, "conv1": 3, "conv2": 8, "head": 5}),
    ({"conv2": 0.25}, {"stem": 6, "conv1": 6, "conv2": 6, "head": 5}),
    ({"conv?": 0.25, "conv1": 0.5}, {"stem": 6, "conv1": 3, "conv2": 6, "head": 5}),
    ({"*": 0.5, "conv1": 0.0}, {"stem": 4, "conv1": 6, "conv2": 4, "head": 5}),
    ({"conv1": 0.95}, {"stem": 8, "conv1": 1, "conv2": 8, "head": 5}),
])  # fmt: skip
def test_ratios_are_shares_that_are_removed(model: nn.Module, ratios: dict[str, float], kept: dict[str, int]) -> None:
    scores = fxprune.Scores.random(model, IMAGES, seed=3)
    plan = scores.plan(ratios=ratios)
    assert widths(plan) == kept
    assert (plan.alpha, plan.budget, plan.allocate) == (None, None, None)
    assert fxprune.verify(model, plan, fxprune.apply(model, plan), IMAGES) < 1e-5


def test_ratios_remove_the_units_proposed_first(model: nn.Module) -> None:
    scores = fxprune.Scores.random(model, IMAGES, seed=3)
    name, start, end = next(group for group in scores.groups if group[0] == "conv1")
    order = np.argsort(scores.propose[start:end])
    assert scores.plan(ratios={name: 0.5}).keep["conv1"] == tuple(sorted(order[3:].tolist()))


def test_ratios_obey_limits(model: nn.Module) -> None:
    scores = fxprune.Scores.random(model, IMAGES, seed=3)
    assert len(scores.plan(ratios={"stem": 0.5}, round_to=3).keep["stem"]) == 6
    assert len(scores.plan(ratios={"stem": 0.9}, min_keep=5).keep["stem"]) == 5


def test_a_level_or_a_budget_decides_what_ratios_leave_open(model: nn.Module) -> None:
    scores = fxprune.Scores.random(model, IMAGES, seed=3)
    plan = scores.plan(alpha=1, allocate="uniform", ratios={"conv1": 0.5})
    assert widths(plan) == {"stem": 1, "conv1": 3, "conv2": 1, "head": 5}
    assert plan.alpha == 1
    budget = scores.plan(macs=0.5, ratios={"conv1": 0.0})
    assert budget.keep["conv1"] == tuple(range(6))
    assert budget.budget is not None
    assert budget.budget.achieved <= 0.5
    loose = scores.plan(macs=1.0, ratios={"conv1": 0.5})
    assert widths(loose) == {"stem": 8, "conv1": 3, "conv2": 8, "head": 5}


@pytest.mark.parametrize(("options", "message"), [
    ({"ratios": {"stem": 0.5, "conv2": 0.25}}, "ratios: 'stem' asks for 0.5 and 'conv2' for 0.25 of the same units, "
     "those of 'stem', 'conv2': give both one ratio"),
    ({"ratios": {"con*": 0.5, "s*": 0.25}}, "ratios: 'con.' asks for 0.5 and 's.' for 0.25 of the same units"),
    ({"ratios": {"head": 0.5}}, "ratios: 'head' cannot lose channels: it is the model's output; leave it out"),
    ({"ratios": {"conv3": 0.5}}, "ratios: no layer that produces channels is called 'conv3'; close names: 'conv"),
    ({"ratios": {"stem": 0.5, "conv1": 1}}, "ratios: 'conv1' has 1; give a share .* at least 0 and less than 1"),
    ({"ratios": {"conv1": "half"}}, "ratios: 'conv1' has 'half'; give a share of the units to remove"),
    ({"ratios": 0.5}, "ratios is 0.5; it is a dict of layers or patterns, each with a share of the units"),
    ({"ratios": {"*": 0.0}, "macs": 0.5}, "is the least that can be reached: give larger ratios=$"),
])  # fmt: skip
def test_ratios_refuse(model: nn.Module, options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxprune.Scores.random(model, IMAGES).plan(**options)


LOADER = [(IMAGES, torch.arange(4) % 5)]


def test_compress_takes_ratios_in_one_round_and_in_several(model: nn.Module) -> None:
    for rounds in (1, 2):
        small = fxprune.compress(model, LOADER, ratios={"stem": 0.5, "conv1": 1 / 3}, rounds=rounds, progress=False)
        assert (len(small.stem.weight), len(small.conv1.weight)) == (4, 4)


def test_compress_warns_where_ratios_come_to_nothing(model: nn.Module) -> None:
    with pytest.warns(fxprune.FxpruneWarning, match="nothing was pruned from Residual: every one of ratios= comes to "
                      "less than half a unit; raise them"):  # fmt: skip
        fxprune.compress(model, LOADER, ratios={"conv1": 0.01}, progress=False)


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_takes_ratios(project: Any) -> None:
    done("score", "mynets:build", "--data", "mynets:loader", "-o", "scores.npz")
    scores = fxprune.Scores.load("scores.npz")
    layer = scores.groups[0][0]
    done("plan", "scores.npz", "--ratio", f"{layer}=0.5", "-o", "plan.json")
    assert fxprune.Plan.load("plan.json") == scores.plan(ratios={layer: 0.5})


@pytest.mark.parametrize("ratio", ["conv1", "conv1=half", "conv1=1"])
def test_the_command_line_refuses_ratios(project: Any, ratio: str) -> None:
    done("score", "mynets:build", "--data", "mynets:loader", "-o", "scores.npz")
    result = invoke("plan", "scores.npz", "--ratio", ratio)
    assert result.exit_code == 2
    assert f"{ratio!r} is no LAYER=SHARE such as layer1.0.conv1=0.5" in flat(result.stderr)
