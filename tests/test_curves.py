"""Curves: what is measured of each group alone, the order of removal that follows, and the default for budgets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import difference, outputs, squares
from nets import layers
from torch import Tensor, nn
from zoo import images, randomise

import fxprune
from fxprune import pipeline
from fxprune.planning.allocation import Allocation
from fxprune.planning.curves import Curves, bundles, measured_levels
from fxprune.recovery import compensate
from fxprune.recovery.compensation.best_graph import OutputError
from fxprune.reporting.report import pruned_of
from fxprune.scoring.calibration import calibration_of
from fxprune.scoring.divergence import Divergence
from fxprune.tracing.graph import flops_of


@layers(lambda: dict(
    a=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8), b=nn.Conv2d(8, 12, 3), c=nn.Conv2d(12, 6, 1),
    head=nn.Linear(6, 5),
))  # fmt: skip
def Net(self: Any, x: Tensor) -> Tensor:
    x = self.norm(self.a(x)).relu_()
    x = self.c(self.b(x).relu()).relu()
    return self.head(x.mean((2, 3)))


def loader(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(10, 3, 8, 8).double(), torch.randint(5, (10,))) for _ in range(count // 10)]


def made(**options: Any) -> tuple[nn.Module, fxprune.Scores]:
    model, data = fxprune.capture(randomise(Net()).double().eval(), images()(2).double()), loader()
    return model, fxprune.score(model, data, progress=False, **options).with_curves(model, data)


def test_a_curve_is_what_the_outputs_lose_when_the_group_alone_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain removal of the units, with the layers behind them refitted by the moments, on the same samples."""
    monkeypatch.setattr("fxprune.scoring.curves.WORK", 1000)  # all samples that are held out
    model, scores = made()
    assert scores.curves is not None
    held = torch.cat([x for x, _ in loader()])[4::5]
    found = bundles(scores.allocation("uniform"))
    assert len(found) == 3
    for bundle, _ in enumerate(found):
        depths, values = scores.curves.of(bundle)
        own = np.split(scores.curves.order, np.cumsum([len(units) for units in found])[:-1])[bundle]
        for depth, value in zip(depths[1:3], values[1:3], strict=True):
            keep = np.ones(len(scores.propose), dtype=bool)
            keep[own[:depth]] = False
            small = fxprune.apply(model, plan_of(scores, keep), scores=scores, compensate="ridge")
            with torch.no_grad():
                lost = Divergence(((0, 1),))(model(held), small(held))
            assert lost == pytest.approx(value, rel=1e-3)


def plan_of(scores: fxprune.Scores, keep: np.ndarray) -> fxprune.Plan:
    whole, padded = scores.plan(alpha=0), np.append(keep, True)
    kept = {site.name: tuple(np.flatnonzero(padded[site.units]).tolist()) for site in scores.sites}
    return replace(whole, keep=kept)


def test_curves_are_measured_on_copies_and_change_nothing() -> None:
    model, data = randomise(Net()).double().train(), loader()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = fxprune.score(model, data, progress=False)
    again = [scores.with_curves(model, data).curves for _ in range(2)]
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert np.array_equal(again[0].values, again[1].values)  # type: ignore[union-attr]
    assert scores.curves is None


def test_the_order_of_removal_follows_the_curves() -> None:
    """Of two groups whose units save as much, the one that loses less is pruned first, by the convex hull."""
    groups = (("a", 0, 4), ("b", 4, 8))
    allocation = Allocation(np.zeros(8), np.arange(8.0), groups)
    curves = Curves(np.array([0, 3, 6]), np.array([1, 2, 3] * 2), np.array([1.0, 4, 9, 2, 3, 4]), np.arange(8))
    level = measured_levels(curves, bundles(allocation), lambda keep: float(keep.sum()))
    assert np.argsort(level[:6], kind="stable").tolist()[:1] == [0]
    assert np.isinf(level[[3, 7]]).all()
    order = [int(unit) for unit in np.argsort(level, kind="stable") if np.isfinite(level[unit])]
    assert order == [0, 4, 5, 6, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_depths_lose_less_at_the_same_cost(seed: int) -> None:
    """For convex curves and costs that add up, every step along the order is the best for what it costs."""
    rng = np.random.default_rng(seed)
    sizes, units = (4, 4, 4), 12
    values = [np.cumsum(np.sort(rng.random(3))) for _ in sizes]
    worth = np.repeat(rng.integers(1, 4, 3), 4).astype(float)
    groups = tuple((str(i), 4 * i, 4 * i + 4) for i in range(3))
    curves = Curves(np.array([0, 3, 6, 9]), np.array([1, 2, 3] * 3), np.concatenate(values), np.arange(units))
    level = measured_levels(
        curves, bundles(Allocation(np.zeros(units), np.arange(12.0), groups)), lambda keep: float(worth[keep].sum())
    )

    def lost(depths: tuple[int, ...]) -> float:
        return sum(float(curve[depth - 1]) if depth else 0.0 for curve, depth in zip(values, depths, strict=True))

    def saved(depths: tuple[int, ...]) -> float:
        return sum(worth[4 * i] * depth for i, depth in enumerate(depths))

    for step in np.unique(level[np.isfinite(level)]):
        depths = tuple(int((level[4 * i : 4 * i + 4] <= step).sum()) for i in range(3))
        others = [d for d in itertools.product(range(4), repeat=3) if saved(d) >= saved(depths)]
        assert lost(depths) <= min(map(lost, others)) + 1e-9


def test_layers_of_equal_width_are_one_bundle() -> None:
    @layers(lambda: dict(lstm=nn.LSTM(6, 8, num_layers=2, batch_first=True), head=nn.Linear(8, 3)))
    def Reader(self: Any, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])

    net = Reader()
    x = torch.randn(12, 5, 6)
    data = [(x, torch.zeros(12))]
    scores = fxprune.score(net, data, squares, progress=False).with_curves(net, data, loss=squares)
    assert len(bundles(scores.allocation("uniform"))) == 1
    plan = scores.plan(macs=0.6)
    assert len({len(kept) for name, kept in plan.keep.items() if name.startswith("lstm")}) == 1
    assert fxprune.verify(net, plan, fxprune.apply(net, plan), x) < 1e-6


def test_a_budget_goes_by_the_curves_and_alpha_by_the_tolerance_of_difference() -> None:
    _, scores = made()
    assert scores.plan(macs=0.6).allocate == "measured"
    assert scores.plan(macs=0.6).keep == scores.plan(macs=0.6, allocate="measured").keep
    assert scores.plan(alpha=0.1).allocate == scores.plan(macs=0.6, allocate="tod").allocate == "tod"
    assert replace(scores, curves=None).plan(macs=0.6).allocate == "tod"
    for budget in (0.9, 0.6, 0.3):
        achieved = scores.plan(macs=budget, allocate="measured").budget
        assert achieved is not None
        assert achieved.achieved <= budget


def test_curves_are_asked_for_by_name() -> None:
    _, scores = made()
    with pytest.raises(fxprune.PlanError, match=r'allocate="measured" needs curves.*with_curves\(model, loader\)'):
        replace(scores, curves=None).plan(macs=0.6, allocate="measured")
    with pytest.raises(fxprune.PlanError, match=r"the scores are not of Net: score it"):
        replace(scores, sites=scores.sites[:-1]).with_curves(randomise(Net()).double(), loader())


def test_curves_are_saved_and_loaded(tmp_path: Path) -> None:
    _, scores = made()
    scores.save(tmp_path / "scores.npz")
    again = fxprune.Scores.load(tmp_path / "scores.npz")
    assert again.curves is not None
    assert again.plan(macs=0.5).to_dict() == scores.plan(macs=0.5).to_dict()
    broken = replace(scores, curves=replace(scores.curves, order=scores.curves.order[:-1]))  # type: ignore[arg-type,union-attr]
    broken.save(tmp_path / "broken.npz")
    with pytest.raises(fxprune.PlanError, match="curves: its shapes or numbers contradict"):
        fxprune.Scores.load(tmp_path / "broken.npz")


def test_compress_hands_over_the_nearest_of_several_plans() -> None:
    model, data = fxprune.capture(randomise(Net()).double().eval(), images()(2).double()), loader()
    small = fxprune.compress(model, data, macs=0.6, progress=False)
    handed = fxprune.report(small)
    assert handed.compensation is not None
    found = dict(handed.compensation.compared)
    assert set(found) == {"measured", "tod", "uniform", "global", "tod, propose=magnitude"}
    scores = fxprune.score(model, data, progress=False).with_curves(model, data)
    best = min(found, key=lambda way: found[way])
    own, taken = scores.candidates(macs=0.6)[best]
    assert pruned_of(small).plan.keep == taken.keep  # type: ignore[union-attr]
    again = fxprune.apply(model, taken, scores=own, loader=data, compensate="sequential")
    assert difference(outputs(small, data[0][0]), outputs(again, data[0][0])) < 1e-9
    assert f"plan by {best}" in str(handed)


def test_plans_are_compared_on_some_of_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = randomise(Net()).double().eval(), []

    def noted(*args: Any, max_samples: int | None, **options: Any) -> Any:
        seen.append(max_samples)
        return calibration_of(*args, max_samples=max_samples, **options)

    monkeypatch.setattr(compensate, "calibration_of", noted)
    monkeypatch.setattr(compensate, "COMPARED", 20)
    monkeypatch.setattr(pipeline, "COMPARED", 20)
    graph = fxprune.capture(model, images(size=8)(2).double())
    flops = sum(flops_of(graph).values()) / 2
    monkeypatch.setattr(compensate, "LIGHT", 25 * flops)
    handed = fxprune.report(fxprune.compress(graph, loader(), macs=0.6, progress=False))
    assert handed.compensation is not None
    assert len(handed.compensation.compared) == 5
    assert seen == [20] * 5 + [None]
    monkeypatch.setattr(compensate, "LIGHT", 15 * flops)
    assert not fxprune.report(fxprune.compress(graph, loader(), macs=0.6, progress=False)).compensation.compared


def test_refits_that_do_not_help_are_said_to_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = randomise(Net()).double().eval(), loader()
    scores = fxprune.score(model, data, progress=False)
    monkeypatch.setattr(OutputError, "__call__", lambda *_: 1.0)
    with pytest.warns(fxprune.FxpruneWarning, match=r"compensate='sequential' changed nothing: no refit brought"):
        fxprune.apply(model, scores.plan(macs=0.6), scores=scores, loader=data, compensate="sequential")


@pytest.mark.parametrize("samples", [64, 640])
def test_the_reported_error_is_that_of_fresh_samples(samples: int) -> None:
    """A wide layer fitted to few rows fits these better than others; samples set apart show it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_(2.5)
    data = [(x, x) for x in torch.randn(samples, 20).split(64)]
    small = fxprune.compress(net, data, macs=0.4, loss=squares, progress=False)
    done, fresh = fxprune.report(small).compensation, torch.randn(4000, 20)
    assert done is not None
    assert done.after is not None
    with torch.no_grad():
        wanted, found = net(fresh), small(fresh)
    true = float((found - wanted).square().mean() / wanted.var(correction=0))
    assert done.after == pytest.approx(true, rel=0.25)


def test_images_are_not_needed_twice_where_one_sample_is_all() -> None:
    model = randomise(Net()).double().eval()
    data = [(images()(1).double(), torch.tensor([1]))]
    assert fxprune.score(model, data, progress=False).with_curves(model, data).curves is None
