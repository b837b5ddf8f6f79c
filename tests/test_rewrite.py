"""Rewriting: what becomes of layers, of literals, of shared tensors, and of the graph."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers import difference, double, outputs
from nets import layers
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import CLASSES, ZOO, conv, head, images, randomise, tensors

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.errors import RewriteError
from fxprune.rewriting.remaining import Checker
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.table import RULES


def pruned(name: str, alpha: float = 0.5, seed: int = 0) -> tuple[nn.Module, fxprune.Plan, Any]:
    """A model of the zoo, a random plan, and what the plan makes of it."""
    case = ZOO[name]
    model = case.build().eval()
    plan = case.scores(seed).plan(alpha=alpha)
    return model, plan, fxprune.apply(model, plan)


@layers(lambda: dict(
    first=nn.Conv2d(3, 8, 3, padding=1), norm=nn.GroupNorm(1, 8), last=nn.Linear(8, 6), even=nn.LayerNorm(6),
    out=nn.Linear(6, CLASSES),
))  # fmt: skip
def GivenWeights(self, x: torch.Tensor) -> torch.Tensor:
    """Layers that are not called: functions are given their weights."""
    x = F.conv2d(x, self.first.weight, self.first.bias, padding=1).relu()
    x = x * self.norm.weight[:, None, None]
    x = F.linear(x.mean((2, 3)), self.last.weight, self.last.bias)
    out: torch.Tensor = self.out(x * self.even.weight)
    return out


def test_attributes_follow_weights_that_functions_are_given() -> None:
    model, example = GivenWeights().eval(), torch.randn(2, 3, 6, 6)
    small = fxprune.apply(model, fxprune.Scores.random(model, example, seed=0).plan(alpha=0.5))
    kept, within = len(small.first.weight), len(small.last.weight)
    assert kept < 8
    assert within < 6
    assert (small.first.in_channels, small.first.out_channels) == (3, kept)
    assert (small.norm.num_groups, small.norm.num_channels) == (1, kept)
    assert (small.last.in_features, small.last.out_features) == (kept, within)
    assert small.even.normalized_shape == (within,)
    assert (small.out.in_features, small.out.out_features) == (within, CLASSES)


@pytest.mark.parametrize(
    "name",
    ["mlp", "residual", "concat_spellings", "nhwc_flatten", "flatten_spellings", "unet", "conv2d", "preactivation2d",
     "split_spellings", "autoencoder", "called_twice"],
)  # fmt: skip
@pytest.mark.parametrize("seed", [1, 2])
def test_deleting_equals_zeroing_the_weights_that_read(name: str, seed: int) -> None:
    """An oracle without gates: in a plain copy of the model, the input weights of the removed units are set to zero."""
    case = ZOO[name]
    model, example = case.build().double().eval(), double(case.example(3))
    graph = fxprune.capture(model, example)
    plan = fxprune.Scores.random(graph, example, seed=seed).plan(alpha=0.6)
    coupling = analyse(graph)
    removed = {
        int(unit)
        for site in coupling.sites
        for channel, unit in enumerate(site.units)
        if channel not in plan.keep[site.name]
    }
    targets = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    with torch.no_grad():
        for edge in coupling.edges:
            layer: Any = model.get_submodule(targets[edge.consumer])
            gone = torch.tensor([int(unit) in removed for unit in edge.units])
            axis = 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
            layer.weight.index_fill_(axis, gone.nonzero().flatten(), 0.0)
    assert removed
    assert difference(outputs(model, example), outputs(fxprune.apply(graph, plan), example)) < 1e-9


def test_weights_are_slices_of_the_original() -> None:
    model, plan, small = pruned("residual")
    kept = {site: list(channels) for site, channels in plan.keep.items()}
    assert torch.equal(small.stem.weight, model.stem.weight[kept["stem"]])
    assert torch.equal(small.norm.running_var, model.norm.running_var[kept["stem"]])
    assert torch.equal(small.a["conv1"].weight, model.a["conv1"].weight[kept["a.conv1"]][:, kept["stem"]])
    assert torch.equal(small.head[2].weight, model.head[2].weight[:, kept["b.conv2"]])


def test_literals_are_mended() -> None:
    _, plan, small = pruned("flatten_spellings", alpha=0.7)
    width = len(plan.keep["d"]) * 16
    assert f"view(-1, {width})" in small.code
    assert "128" not in small.code
    assert small(images(size=4)(7)).shape == (7, 5)


def test_gathering_indices_are_no_part_of_the_state() -> None:
    model, _, small = pruned("permutation")
    assert list(small.state_dict()) == list(model.state_dict())
    loaded = {key: value + 1 if value.is_floating_point() else value for key, value in small.state_dict().items()}
    small.load_state_dict(loaded)
    assert all(torch.equal(small.state_dict()[key], loaded[key]) for key in loaded)


def test_shared_modules_and_tensors_stay_shared() -> None:
    _, _, small = pruned("two_names")
    assert small.alias is small.b is small.layers[0]
    assert small.layers[1] is small.layers[2] is small.c
    _, _, small = pruned("one_tensor_in_two_modules")
    assert small.c.weight is small.b.weight
    assert small.c.bias is None
    for twin in (copy.deepcopy(small),):
        assert twin.c.weight is twin.b.weight


def test_buffers_keep_their_kind() -> None:
    model, _, small = pruned("buffers")
    persistent = set(model.state_dict())
    assert set(small.state_dict()) == persistent
    assert "ramp" in dict(small.named_buffers())
    assert small.mask.dtype == model.mask.dtype


def test_the_number_of_channels_stays_the_originals_where_it_is_a_number() -> None:
    model, _, small = pruned("sizes_of_channels")
    assert fxprune.verify(model, *pruned("sizes_of_channels")[1:], images()(2)) < 1e-4
    assert any(node.target in ("shape", "size") or 12 in node.args for node in small.graph.nodes)


def test_the_emitted_module_can_be_traced_again() -> None:
    for name in ("residual", "flatten_spellings", "split_spellings", "channel_shuffle"):
        _, _, small = pruned(name)
        example = ZOO[name].example(2)
        assert difference(outputs(small, example), outputs(fx.symbolic_trace(small), example)) == 0


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_computed_weight_keeps_its_layer_whole(wrap: Any) -> None:
    """A parametrization makes the weight anew at each call; what it works on stays, all else is pruned."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), wrap(conv(8, 8)), nn.ReLU(), conv(8, 8), nn.ReLU(), head(8)).eval()
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=1.0)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, images()(3)) < 1e-4
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.get_submodule("4").out_channels == 1
    assert small.get_submodule("2").weight.shape == (8, 8, 3, 3)


def test_channels_last_weights_stay_channels_last() -> None:
    model = ZOO["residual"].build().to(memory_format=torch.channels_last)
    example = images()(3).contiguous(memory_format=torch.channels_last)
    plan = fxprune.Scores.random(model, example).plan(alpha=0.5)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, example) < 1e-4
    assert small.a["conv2"].weight.is_contiguous(memory_format=torch.channels_last)


@layers(lambda: dict(a=conv(3, 8), b=conv(8, 4), head=head(4)))
def Rolled(self, x: Tensor) -> Tensor:
    return self.head(self.b(self.a(x).roll((2, 1), (1, 2))))


@pytest.mark.parametrize("keep", [(0, 1, 2, 3, 4, 5, 7), (1, 3, 4, 6), (0, 1, 2)])
def test_channels_that_move_together_with_rows_are_permuted_before(keep: tuple[int, ...]) -> None:
    model, x = Rolled().double().eval(), images()(2).double()
    plan = fxprune.Scores.random(model, x).plan(alpha=0.0)
    plan = dataclasses.replace(plan, keep={**plan.keep, "a": keep})
    assert fxprune.verify(model, plan, fxprune.apply(model, plan), x) < 1e-12


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("odd"), r"the rule for module .*ReLU fails on narrowed inputs, node _?1, .*KeyError: 'odd'"),
        (ValueError("8 is no 4"), r"cannot be narrowed \(8 is no 4; after mending: .*\): exclude the layers"),
    ],
)
def test_only_sizes_that_do_not_fit_are_mended(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    """Any other error of a rule is its bug, and is not hidden behind the mending."""

    def broken(ctx: Context, module: nn.Module, x: Labels) -> Labels:
        if isinstance(ctx, Checker):
            raise error
        return x

    monkeypatch.setitem(RULES, nn.ReLU, broken)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = fxprune.Scores.random(model, tensors(6)(2)).plan(alpha=0.5)
    with pytest.raises(RewriteError, match=message):
        fxprune.apply(model, plan)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 12), (8, 8)])
def test_transposed_convolutions_in_groups_lose_the_same_slots_of_every_group(inputs: int, outputs: int) -> None:
    middle = nn.ConvTranspose2d(inputs, outputs, 3, padding=1, groups=2)
    model = randomise(nn.Sequential(conv(3, inputs), nn.ReLU(), middle, nn.ReLU(), conv(outputs, 4), head(4)))
    model, x = model.double().eval(), images()(2).double()
    for alpha in (0.5, 1.0):
        plan = fxprune.Scores.random(model, x).plan(alpha=alpha)
        small = fxprune.apply(model, plan)
        assert fxprune.verify(model, plan, small, x) < 1e-9
    assert small.get_submodule("2").weight.shape[:2] == (2, 1)
