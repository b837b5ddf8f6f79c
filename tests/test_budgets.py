"""Budgets: shares of parameters, MACs and time, kept to from below."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from helpers import parameters
from hypothesis import given
from hypothesis import strategies as st
from zoo import ZOO

import fxprune
from fxprune.errors import PlanError
from fxprune.planning.allocation import ALLOCATIONS, Allocation
from fxprune.planning.budgets import meet, percentages
from fxprune.tracing.facts import macs
from fxprune.tracing.graph import example_of

RESNET = torchvision.models.resnet18(weights=None).eval()
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GRAPH = fxprune.capture(RESNET, IMAGE)
SCORES = fxprune.Scores.random(GRAPH, IMAGE, seed=0)


def of_zoo(name: str, **options: Any) -> fxprune.Scores:
    case = ZOO[name]
    return fxprune.Scores.random(case.build(), case.example(2), seed=0, **options)


def shares(plan: fxprune.Plan) -> dict[str, float]:
    """What the rewritten ResNet-18 costs, relative to the original."""
    small, example = fxprune.apply(GRAPH, plan), example_of(GRAPH)
    return {
        "params": parameters(small) / parameters(GRAPH),
        "macs": macs(small, example) / macs(GRAPH, example),
    }


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("share", [0.9, 0.3])
def test_a_budget_is_met_from_below_within_a_percent(allocate: str, what: str, share: float) -> None:
    plan = SCORES.plan(**{what: share}, allocate=allocate)
    found = shares(plan)[what]
    assert 0.99 * share <= found <= share
    assert plan.budget == fxprune.Budget(what, share, found)
    assert plan.alpha is not None


@pytest.mark.parametrize("options", [{"round_to": 8}, {"round_to": 16, "min_keep": 20}])
def test_widths_keep_to_floor_and_multiple(options: dict[str, int]) -> None:
    plan = SCORES.plan(macs=0.6, **options)
    for site, kept in plan.keep.items():
        assert len(kept) == plan.widths[site] or len(kept) % options["round_to"] == 0, site
        assert len(kept) >= min(options.get("min_keep", 1), plan.widths[site])
    assert 0.97 * 0.6 <= shares(plan)["macs"] <= 0.6


@pytest.mark.parametrize("name", ["channel_slices", "grouped_chain", "shuffle_units", "lstm_projected_deep_both_ways"])
def test_pieces_keep_one_unit(name: str) -> None:
    case = ZOO[name]
    model, plan = case.build(), of_zoo(name).plan(macs=0.6)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, case.example(3)) < 1e-4
    assert macs(small, case.example(2)) <= 0.6 * macs(model_graph(name), case.example(2))


def model_graph(name: str) -> Any:
    case = ZOO[name]
    return fxprune.capture(case.build(), case.example(2))


def test_the_whole_as_budget_keeps_the_whole() -> None:
    plan = SCORES.plan(macs=1.0)
    assert {site: len(kept) for site, kept in plan.keep.items()} == plan.widths
    assert plan.alpha is None
    assert str(plan).startswith("plan (asked for 100.0% of the MACs, achieved 100.0%): 5800 of 5800")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Allocation, np.ndarray[Any, Any], float]:
    """Groups of units with levels, in coarse steps, a price for each unit, and a share."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    n = sum(sizes)
    ends = np.cumsum(sizes).tolist()
    groups = [(f"g{i}", end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    level = np.array(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, np.inf]), min_size=n, max_size=n)))
    propose = np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), dtype=np.float64)
    price = np.array(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)), dtype=np.float64)
    multiple = draw(st.integers(1, 4))
    return Allocation(level, propose, groups, round_to=multiple), price, draw(st.floats(0.05, 1.0))


@given(problems())
def test_never_above_the_budget_and_no_unit_fits_any_more(
    problem: tuple[Allocation, np.ndarray[Any, Any], float],
) -> None:
    """What stays is within the budget; within 1 %, or else no unit of the level before could come back."""
    allocation, price, share = problem

    def cost(keep: Any) -> float:
        return float(price[keep].sum())

    limit = share * price.sum()
    least = cost(allocation.keep(1.0))
    if least > limit:
        with pytest.raises(PlanError, match=r"is the least that can be reached: exclude less"):
            meet(allocation, cost, share, "macs", ["exclude less"])
        return
    found = meet(allocation, cost, share, "macs", ["exclude less"])
    assert cost(found.keep) <= limit
    assert found.achieved == pytest.approx(cost(found.keep) / price.sum())
    assert (allocation.settled(found.keep) == found.keep).all()
    if cost(found.keep) < 0.99 * limit and found.level is not None:
        lower = allocation.level[allocation.level < found.level]
        before = allocation.keep(float(lower.max()) if len(lower) else -1.0)
        assert cost(before) > limit
        for unit in np.flatnonzero(before & ~found.keep):
            more = found.keep.copy()
            more[unit] = True
            assert cost(allocation.settled(more)) > limit


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_plan_and_the_report_say_what_was_asked(tmp_path: Path) -> None:
    plan = SCORES.plan(macs=0.5)
    assert plan.budget is not None
    said = f"asked for 50.0% of the MACs, achieved {plan.budget.achieved:.1%}"
    assert str(plan).startswith(f"plan at alpha {plan.alpha:g} ({said}): ")
    plan.save(tmp_path / "plan.json")
    assert fxprune.Plan.load(tmp_path / "plan.json") == plan
    notes = fxprune.report(fxprune.apply(GRAPH, plan))
    assert f"\n{said}\n" in str(notes)
    assert notes.to_dict()["budget"] == {"of": "macs", "asked": 0.5, "achieved": plan.budget.achieved}
    assert notes.macs_after / notes.macs_before == plan.budget.achieved


def test_one_thing_decides() -> None:
    with pytest.raises(PlanError, match=r"alpha=0.1 and macs=0.5 are given: one of alpha, params, macs, latency"):
        SCORES.plan(0.1, macs=0.5)


@pytest.mark.parametrize(("options", "message"), [
    ({"macs": 0.0012}, r"macs=0.0012 asks for 0.12% of the MACs, but .*% is the least that can be reached: run "
     r'compress with rounds=2 or more, pass allocate="uniform" or raise macs=0.0012 to at least 0\.00\d{1,3}$'),
    ({"macs": 1e-5}, r"reached: raise macs=1e-05 to at least 0\.\d+$"),
    ({"macs": 1e-5, "allocate": "uniform"}, r"reached: raise macs=1e-05 to at least 0\.\d+$"),
    ({"macs": 0.5, "round_to": 640}, "100.0% is the least that can be reached: lower round_to=640$"),
    ({"macs": 0.5, "min_keep": 640, "round_to": 640}, "reached: lower round_to=640 and min_keep=640$"),
])  # fmt: skip
def test_what_cannot_be_reached(options: Any, message: str) -> None:
    """Only what would help is suggested, what binds first."""
    with pytest.raises(PlanError, match=message):
        SCORES.plan(**options)


def test_the_least_share_suggested_can_be_reached() -> None:
    with pytest.raises(PlanError) as raised:
        SCORES.plan(macs=1e-4)
    assert SCORES.plan(macs=float(str(raised.value).rpartition(" ")[2])).budget


def test_exclusions_are_suggested_where_there_are_some() -> None:
    scores = fxprune.Scores.random(GRAPH, IMAGE, exclude="layer4")
    with pytest.raises(PlanError, match="exclude less or raise"):
        scores.plan(macs=0.01)


# -- latency -----------------------------------------------------------------------------------------------------------


def test_latency_needs_times() -> None:
    with pytest.raises(PlanError, match=r"latency is given, but no times were taken: scores = scores.with_latency"):
        SCORES.plan(latency=0.5)


@pytest.mark.usefixtures("steady_times")
def test_the_estimate_is_calibrated_and_falls(tmp_path: Path) -> None:
    timed = SCORES.with_latency(RESNET, torch.randn(4, 3, 32, 32), repeats=3)
    assert timed.times is not None
    whole = timed.times.estimate(np.ones(len(SCORES.propose), dtype=bool))
    assert whole > timed.times.rest >= 0
    estimates = [timed.times.estimate(timed.allocation("uniform").keep(a)) for a in (0.1, 0.3, 0.5, 0.7)]
    assert sorted([whole, *estimates], reverse=True) == [whole, *estimates]
    share = (1 + min(estimates) / whole) / 2
    plan = timed.plan(latency=share, allocate="uniform")
    assert plan.budget is not None
    assert plan.budget.achieved <= share
    timed.save(tmp_path / "scores.npz")
    assert fxprune.Scores.load(tmp_path / "scores.npz").plan(latency=share, allocate="uniform") == plan


def test_times_of_another_model() -> None:
    with pytest.raises(PlanError, match="the scores are not of ResNet: score it, or give the"):
        SCORES.with_latency(torchvision.models.resnet34(weights=None), repeats=1)


def test_a_budget_just_out_of_reach_is_told_from_what_can_be_reached() -> None:
    scores = of_zoo("residual")
    least = scores.plan(alpha=1.0)
    graph = ZOO["residual"].build()
    part = parameters(fxprune.apply(graph, least)) / parameters(graph)
    with pytest.raises(PlanError) as caught:
        scores.plan(params=part - 1e-5)
    asked, reached = re.findall(r"([0-9.]+)%", str(caught.value))
    assert float(asked) < float(reached)
    assert f"{part - 1e-5:.1%}" == f"{part:.1%}"


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        (0.3, 0.42, ("30.0%", "42.0%")), (0.001, 0.00104, ("0.100%", "0.104%")),
        (0.5, 0.5000004, ("50.00000%", "50.00004%")),
    ],
)  # fmt: skip
def test_percentages_have_the_digits_that_tell_them_apart(first: float, second: float, texts: tuple[str, str]) -> None:
    assert percentages(first, second) == texts
