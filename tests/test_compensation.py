"""Compensation: what each level recovers, what it leaves alone, and what it says where something is missing."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import batches, difference, outputs, part_of, picture, same_picture, squares, storages
from nets import layers
from torch import Tensor, nn
from zoo import CLASSES, ZOO, Case, images, tensors

import fxprune
from fxprune.errors import PlanError
from fxprune.recovery.compensation import least_squares, sequential, wide
from fxprune.scoring import moments
from fxprune.scoring.calibration import Calibration, calibration_of
from fxprune.scoring.signals import table

LEVELS = ("bias", "ridge", "sequential")
SIZES = (12, 7, 1)


def scored(model: nn.Module, loader: Any, **options: Any) -> fxprune.Scores:
    return fxprune.score(model, loader, squares, propose="magnitude", protect="random", progress=False, **options)


def keeping(scores: fxprune.Scores, **keep: tuple[int, ...]) -> fxprune.Plan:
    """The plan that keeps everything but of some sites what is given."""
    plan = scores.plan(alpha=0)
    whole = {site: tuple(range(of)) for site, of in plan.widths.items()}
    return fxprune.Plan(whole | {name.replace("__", "."): kept for name, kept in keep.items()}, **_rest(plan))


def _rest(plan: fxprune.Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__ if name != "keep"}


def judged(small: nn.Module) -> tuple[float, float]:
    """The error on the samples that choose what is kept, before and after compensation."""
    done = fxprune.report(small).compensation
    assert done is not None
    assert done.chosen is not None
    return done.chosen


def errors(model: nn.Module, plan: fxprune.Plan, scores: fxprune.Scores, loader: Any) -> dict[str, tuple[float, float]]:
    """The error on what is held out, before and after, at every level."""
    return {
        level: judged(fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level)) for level in LEVELS
    }


@pytest.mark.parametrize("case", part_of(list(ZOO.values())[::5], 6, list(ZOO)[::5]))
def test_every_level_holds_what_is_promised(case: Case) -> None:
    model = case.build()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    loader = batches(case.example, CLASSES, SIZES) if case.any_batch else [(case.example(2), torch.arange(2))]
    scores = scored(model, loader, classes=None if case.any_batch else lambda t: t)
    plan, before = scores.plan(alpha=0.5), picture(model)
    for level in LEVELS:
        small = fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level)
        assert same_picture(before, picture(model))
        assert storages(model).isdisjoint(storages(small))
        assert all(t.isfinite().all() for t in outputs(small, case.example(2)))
        done = fxprune.report(small).compensation
        assert done is not None
        assert done.chosen is None or done.chosen[1] <= done.chosen[0]
        new = small.state_dict().keys() - model.state_dict().keys()
        assert [key for key in small.state_dict() if key not in new] == list(model.state_dict())
        assert all(key.endswith("bias") for key in new)
        modes = {name: module.training for name, module in small.named_modules()}
        assert all(modes[name] == m.training for name, m in model.named_modules() if name in modes)


@pytest.mark.parametrize(
    "name", part_of(["residual", "multihead_no_bias", "grouped_transposed", "words_and_places"], 4)
)
def test_the_result_is_repeatable_and_can_be_copied(name: str) -> None:
    model, example = ZOO[name].build(), ZOO[name].example(2)
    loader = batches(ZOO[name].example, CLASSES, SIZES)
    scores = scored(model, loader)
    first, second = (
        fxprune.apply(model, scores.plan(alpha=0.4), scores=scores, loader=loader, compensate="sequential")
        for _ in range(2)
    )
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert difference(outputs(first, example), outputs(twin, example)) == 0
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(torch.load(stream, weights_only=True))
    assert difference(outputs(first, example), outputs(second, example)) == 0


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.wide), torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = ZOO["residual"].build().to(dtype)
    loader = [(x.to(dtype), y) for x, y in batches(ZOO["residual"].example, CLASSES, SIZES)]
    scores = scored(model, loader)
    for before, after in errors(model, scores.plan(alpha=0.4), scores, loader).values():
        assert after < before
    small = fxprune.apply(model, scores.plan(alpha=0.4), loader=loader, compensate="sequential")
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {dtype}


def dependent(inputs: int = 4, *, conv: bool = False) -> nn.Sequential:
    """A network whose third hidden channel is a linear function of the first two."""
    first: nn.Module = nn.Conv2d(inputs, 3, 3) if conv else nn.Linear(inputs, 3)
    last: nn.Module = nn.Conv2d(3, 5, 3) if conv else nn.Linear(3, 5)
    with torch.no_grad():
        for parameter in (first.weight, first.bias):
            parameter[2] = 0.7 * parameter[0] - 0.4 * parameter[1]
    return nn.Sequential(first, last)


@pytest.mark.parametrize("conv", [False, True])
def test_a_channel_that_follows_from_others_is_made_up_for(*, conv: bool) -> None:
    model = dependent(conv=conv)
    shape = (4, 9, 9) if conv else (4,)
    loader = batches(tensors(*shape), CLASSES, (40, 40))
    scores = scored(model, loader, classes=lambda t: t)
    found = errors(model, plan := keeping(scores, **{"0": (0, 1)}), scores, loader)
    assert found["bias"][1] > 1e-3
    assert found["ridge"][1] < 1e-5
    assert found["sequential"][1] < 1e-10
    small = fxprune.apply(model, plan, loader=loader, compensate="sequential")
    assert difference(outputs(model, tensors(*shape)(3)), outputs(small, tensors(*shape)(3))) < 1e-5


@pytest.mark.parametrize("norm", [False, True])
def test_a_constant_channel_is_made_up_for_by_its_mean(*, norm: bool) -> None:
    """A bias is made where the layer has none, unless a BatchNorm behind it can take the constant."""
    behind = [nn.BatchNorm2d(5)] if norm else []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, bias=False), *behind)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 2
    loader = batches(images(3, 8), CLASSES, (10, 10))
    scores = scored(model, loader)
    small = fxprune.apply(model, keeping(scores, **{"0": (0, 1, 2)}), scores=scores, loader=loader, compensate="bias")
    assert difference(outputs(model, images(3, 8)(3)), outputs(small, images(3, 8)(3))) < 1e-5
    assert ("1.bias" in small.state_dict()) is not norm


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [False, True])
def test_only_biases_that_exist_are_used(level: Any, bias: bool) -> None:
    """Where the second layer has no bias, it keeps none, and a map without a constant is fitted about zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=bias))
    with torch.no_grad():
        model[0].bias.fill_(2.0)
        model[0].weight[3], model[0].bias[3] = 0.5 * model[0].weight[0], 1.0  # half of the first channel
    loader = batches(tensors(3), CLASSES, (40, 40))
    scores = scored(model, loader, classes=lambda t: t)
    plan = keeping(scores, **{"0": (0, 1, 2)})
    how: Any = {"scores": scores, "loader": loader, "compensate": level}
    small = fxprune.apply(model, plan, **how, new_biases=False)
    assert small.state_dict().keys() == model.state_dict().keys()
    before, after = judged(small)
    if level == "bias" and not bias:
        assert after == before
        assert not fxprune.report(small).compensation.filled
    else:
        assert after < before
    if level != "bias":
        assert difference(outputs(model, tensors(3)(3)), outputs(small, tensors(3)(3))) < 0.01
    with_new = fxprune.apply(model, plan, **how)
    assert bias or "2.bias" in with_new.state_dict()


def test_wide_layers_get_no_new_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "WIDE", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4, bias=False))
    loader = batches(images(3, 4), CLASSES, (40, 40))
    plan = keeping(scored(model, loader), **{"0": (0, 1, 2, 3)})
    small = fxprune.apply(model, plan, loader=loader, compensate="sequential", new_biases=False)
    assert fxprune.report(small).compensation.refitted
    assert small.state_dict().keys() == model.state_dict().keys()


def test_the_mean_stands_in_where_a_linear_map_does_harm() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 2
    loader = batches(tensors(4), CLASSES, (40, 40))
    scores = scored(model, loader)
    plan = keeping(scores, **{"0": (0, 1)})
    wrong = np.eye(3) + 50 * np.eye(3)[::-1]
    false = replace(scores, moments={key: replace(m, covariance=wrong) for key, m in scores.moments.items()})
    unseen = fxprune.apply(model, plan, scores=false, compensate="ridge")
    judged = fxprune.apply(model, plan, scores=false, loader=loader, compensate="ridge")
    example = tensors(4)(3)
    assert difference(outputs(model, example), outputs(unseen, example)) > 0.1
    assert difference(outputs(model, example), outputs(judged, example)) < 1e-5
    assert fxprune.report(judged).compensation.filled == ("_1",)


@pytest.mark.parametrize(
    "options", [{"head_dim": True}, {"inexact": True}, {"head_dim": True, "inexact": True}], ids=str
)
@pytest.mark.parametrize("name", part_of(["multihead_plain", "shared_keys_2_function"], 2))
def test_columns_of_heads_and_inexact_groups_are_made_up_for(name: str, options: dict[str, bool]) -> None:
    case = ZOO[name]
    model, loader = case.build(), batches(case.example, CLASSES, (20, 20, 7))
    scores = scored(model, loader, **options)
    plan = scores.plan(alpha=0.6)
    plain = fxprune.apply(model, plan)
    assert fxprune.report(plain).params_after < fxprune.report(plain).params_before
    for level in LEVELS:
        small = fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level)
        before, after = judged(small)
        assert after < before
        shapes = {key: value.shape for key, value in small.state_dict().items()}
        assert shapes.items() >= {key: value.shape for key, value in plain.state_dict().items()}.items()
        assert [x.shape for x in outputs(small, case.example(3))] == [x.shape for x in outputs(model, case.example(3))]


@layers(lambda: dict(
    first=nn.Linear(6, 8), twice=nn.Linear(8, 8), tied=nn.Linear(8, 8), a=nn.Linear(8, 5, bias=False),
    b=nn.Linear(8, 5, bias=False), norm=nn.BatchNorm1d(5),
))  # fmt: skip
def Shared(self, x: Tensor) -> Tensor:
    """One layer called twice, another whose weight is read by a function as well, and a BatchNorm for two layers."""
    x = self.first(x).relu()
    x = self.twice(self.twice(x).relu()).relu()
    y = F.linear(self.tied(x).relu(), self.tied.weight)
    return self.norm(self.a(y)) + self.norm(self.b(x))


def test_what_serves_others_too_is_left_alone() -> None:
    model = Shared()
    loader = batches(tensors(6), CLASSES, (30, 20))
    scores = scored(model, loader)
    small = fxprune.apply(model, scores.plan(alpha=1.0), scores=scores, loader=loader, compensate="sequential")
    plain = fxprune.apply(model, scores.plan(alpha=1.0))
    done = fxprune.report(small).compensation
    assert done is not None
    assert {layer.layer for layer in done.layers} <= {"a", "b"}
    for name in ("twice.weight", "tied.weight", "norm.running_mean"):
        assert torch.equal(small.state_dict()[name], plain.state_dict()[name])


@pytest.mark.wide
def test_levels_differ_in_order_on_a_trained_network() -> None:
    """scikit-learn's digits, a residual network, no training after pruning: each level is nearer to the original."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.a, self.b = (
                nn.Sequential(
                    nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                    nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
                )
                for _ in range(2)
            )  # fmt: skip
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = F.relu(x + self.a(x))
            x = F.relu(x + self.b(x))
            return self.head(x.mean((2, 3)))

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        rows = torch.randperm(1200, generator=torch.Generator().manual_seed(step))[:100]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    loader = list(zip(x[:400].split(100), y[:400].split(100), strict=True))
    scores = fxprune.score(model, loader, progress=False)
    plan = scores.plan(macs=0.5)
    found = errors(model, plan, scores, loader)
    assert found["sequential"][1] < found["ridge"][1] <= found["bias"][1] < found["bias"][0]
    test = x[1200:]
    expected = outputs(model, test)[0]
    far = {
        level: float((outputs(fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level), test)[0]
                      - expected).square().mean())
        for level in ("none", "sequential")
    }  # fmt: skip
    assert far["sequential"] < 0.25 * far["none"]


WIDE = {
    "conv": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3)),
    "flattened": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_layers_are_fitted_by_channel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(WIDE[name])
    with torch.no_grad():  # the last channel behind the rectifier is half of the one before it
        model[0].weight[7], model[0].bias[7] = 0.5 * model[0].weight[6], 0.5 * model[0].bias[6]
    loader = batches(images(3, 8), CLASSES, (40, 40))
    scores = scored(model, loader)
    plan = keeping(scores, **{"0": tuple(range(7))})
    monkeypatch.setattr(sequential, "WIDE", 16)
    small = fxprune.apply(model, plan, loader=loader, compensate="sequential")
    done = fxprune.report(small).compensation
    assert done is not None
    assert done.layers[0].strength is not None
    assert done.layers[0].after < 1e-6
    assert difference(outputs(model, images(3, 8)(3)), outputs(small, images(3, 8)(3))) < 1e-3


def test_layers_of_many_channels_are_fitted_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    loader = batches(tensors(6), CLASSES, (300, 300))
    for module, name, most in (
        (sequential, "WIDE", 16), (wide, "MOST_CHANNELS", 16), (least_squares, "SINGLE", 16), (moments, "SINGLE", 16),
        (table, "SINGLE", 16),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, most)
    scores = scored(model, loader)
    assert next(iter(scores.moments.values())).covariance.dtype == np.float32
    small = fxprune.apply(model, scores.plan(params=0.5), loader=loader, compensate="sequential")
    assert small.get_parameter("2.weight").dtype == torch.float32
    done = fxprune.report(small).compensation
    assert done is not None
    assert done.layers[0].strength is not None
    before, after = judged(small)
    assert after < 0.2 * before


def test_layers_that_are_too_wide_to_be_fitted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    loader = batches(tensors(6), CLASSES, (40, 40))
    plan = scored(model, loader).plan(params=0.5)
    for module, name in ((sequential, "WIDE"), (sequential, "WIDEST"), (wide, "MOST_CHANNELS")):
        monkeypatch.setattr(module, name, 12)
    with pytest.warns(fxprune.FxpruneWarning) as found:
        fxprune.apply(model, plan, loader=loader, compensate="sequential")
    said = {str(warning.message) for warning in found}
    assert "2 reads 19 numbers: it is not refitted, as layers are up to 12" in said
    assert any(text.startswith("compensate='sequential' changed nothing") for text in said)


def test_what_is_held_out_is_judged_in_batches_as_large_as_those_given() -> None:
    model, x = nn.Linear(4, 3), tensors(4)(27)
    graph = fxprune.capture(model, x[:2])
    data = Calibration.of(graph, [[part] for part in x.split([4, 10, 10, 3])])
    judged = data.judged(graph)
    assert [len(mask) for _, mask in judged] == [5]
    assert all(bool(mask.all()) for _, mask in judged)
    assert torch.equal(judged[0][0][0], x[4::5])
    fitted = data.fitted(graph, 8)
    assert sum(len(values[0]) for values in fitted.inputs) == 8
    assert not any(bool(mask.any()) for mask in fitted.held)
    rest = {tuple(row) for row in x[torch.arange(27) % 5 != 4].tolist()}
    assert {tuple(row) for values in fitted.inputs for row in values[0].tolist()} <= rest


def test_as_many_batches_as_there_is_memory_for() -> None:
    model, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), tensors(4)
    graph = fxprune.capture(model, example(2))
    loader = batches(example, CLASSES, (10, 10, 10))
    a_sample = 2 * (8 + 8) * 4
    for memory, count in ((0, 1), (20 * a_sample, 2), (30 * a_sample, 3)):
        assert len(calibration_of(model, graph, loader, memory=memory).inputs) == count


def test_a_part_that_is_called_several_times() -> None:
    @layers(lambda: dict(part=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))))
    def Twice(self, x: Tensor) -> Tensor:
        return self.part(self.part(x))

    model, loader = Twice(), batches(tensors(4), CLASSES, (20, 10))
    scores = scored(model, loader, submodule="part")
    small = fxprune.apply(model, scores.plan(alpha=0.5), scores=scores, loader=loader, compensate="sequential")
    before, after = judged(small.part)
    assert after < before


def test_batchnorms_get_the_statistics_of_what_they_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    graph = fxprune.capture(model.eval(), images(3, 8)(2))
    data = Calibration.of(graph, [[images(3, 8)(9)], [images(3, 8)(6)]])
    from fxprune.recovery.compensation.norm_statistics import re_estimate

    assert re_estimate(graph, data) == 1
    rows = torch.cat([x[~mask] for (x,), mask in zip(data.inputs, data.held, strict=True)])
    with torch.no_grad():
        read = model[2](model[1](model[0](rows))).movedim(1, 0).flatten(1)
    norm: Any = graph.get_submodule("3")
    torch.testing.assert_close(norm.running_mean, read.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(norm.running_var, read.var(1), atol=1e-6, rtol=1e-5)


def test_errors_say_what_is_missing() -> None:
    model = ZOO["residual"].build()
    plan = fxprune.Scores.random(model, ZOO["residual"].example(2)).plan(alpha=0.4)
    with pytest.raises(PlanError, match="compensate is 'all'; it is one of none, bias, ridge, sequential"):
        fxprune.apply(model, plan, compensate="all")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="compensate is 'more'"):
        fxprune.compress(model, [], compensate="more")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="compensate='ridge' works with the moments of the scoring pass: pass scores="):
        fxprune.apply(model, plan, compensate="ridge")
    with pytest.raises(PlanError, match='compensate="sequential" fits layers to data: pass loader='):
        fxprune.apply(model, plan, compensate="sequential")


@pytest.mark.slow
def test_resnet20_keeps_its_accuracy(data: Path) -> None:
    """CIFAR-10, 65 % of the MACs, no training."""
    model = cifar.load(cifar.resnet20, data)
    x, y = cifar.images(data, "train", 1000)
    test, labels = cifar.images(data, "test", 2000)
    loader = list(zip(x.split(250), y.split(250), strict=True))
    scores = fxprune.score(model, loader, progress=False)
    plan = scores.plan(macs=0.65)
    found = {}
    for level in ("none", *LEVELS):
        small = fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level)  # type: ignore[arg-type]
        found[level] = float((outputs(small, test)[0].argmax(1) == labels).float().mean())
    assert found["none"] < 0.70
    assert found["sequential"] >= 0.82
    assert found["none"] < found["bias"] < found["ridge"] < found["sequential"]
