"""Several rounds: each prunes what the one before left, and one plan leads to the result from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import difference, outputs, parameters
from nets import layers
from torch import nn
from zoo import CLASSES, ZOO, conv, head, images

import fxprune
from fxprune.errors import FxpruneWarning, PlanError, UnreachableError
from fxprune.rounds import composed
from fxprune.tracing.facts import macs
from fxprune.tracing.graph import example_of

CASES = [
    "residual",
    "concat_spellings",
    "resnext_block",
    "shuffle_units",
    "attention_chunk_matmul",
    "lstm_deep_both_ways",
]


def loader(name: str) -> list[tuple[Any, torch.Tensor]]:
    return [(ZOO[name].example(20), torch.arange(20) % CLASSES)]


def compress(name: str, **options: Any) -> Any:
    """Plain removal, which a plan alone repeats."""
    return fxprune.compress(ZOO[name].build(), loader(name), progress=False, compensate="none", **options)


def plan_in(small: Any) -> fxprune.Plan:
    found = small.meta["fxprune"].plan
    assert isinstance(found, fxprune.Plan)
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_plan_leads_to_the_result_from_the_original(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    small = compress(name, alpha=0.2, rounds=3)
    plan = plan_in(small)
    plan.save(tmp_path / "plan.json")
    again = fxprune.apply(case.build(), fxprune.Plan.load(tmp_path / "plan.json"))
    assert {key: t.shape for key, t in small.state_dict().items()} == {
        k: t.shape for k, t in again.state_dict().items()
    }
    assert list(small.state_dict()) == list(again.state_dict())
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in small.state_dict().items())
    assert difference(outputs(again, case.example(3)), outputs(small, case.example(3))) < 1e-6
    assert fxprune.verify(case.build(), plan, small, case.example(3)) < 1e-4


def test_rounds_go_further_than_one() -> None:
    once, often = compress("residual", alpha=0.0), compress("residual", alpha=0.0, rounds=3)
    assert parameters(often) < parameters(once)
    assert plan_in(often).alpha == 0.0


@pytest.mark.parametrize("what", ["params", "macs"])
def test_a_budget_is_that_of_the_original(what: str) -> None:
    widths = [(3, 96), (96, 128), (128, 96)]  # a unit is a small share of the whole
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(*pair, 3), nn.ReLU()) for pair in widths), *head(96))
    graph = fxprune.capture(model, images(3, 8)(2))
    data = [(images(3, 8)(20), torch.arange(20) % CLASSES)]
    small = fxprune.compress(model, data, **{what: 0.4}, rounds=3, compensate="none", progress=False)
    example = example_of(graph)
    left = {
        "params": parameters(small) / parameters(graph),
        "macs": macs(small, example) / macs(graph, example),
    }[what]
    assert 0.39 < left <= 0.4
    budget = plan_in(small).budget
    assert budget is not None
    assert (budget.of, budget.asked) == (what, 0.4)
    assert budget.achieved == pytest.approx(left)


def test_the_report_is_about_the_original() -> None:
    model = ZOO["residual"].build()
    small = compress("residual", params=0.5, rounds=2)
    notes = fxprune.report(small)
    assert notes.params_before == parameters(model)
    assert notes.params_after == parameters(small)
    assert {group.name: group.before for group in notes.groups} == {
        "stem": 8,
        "a.conv1": 8,
        "b.conv1": 12,
        "b.conv2": 12,
    }
    assert notes.error is not None
    assert notes.error < 1e-4
    assert f"\n{notes.budget}\n" in str(notes)
    assert str(notes.budget).startswith("asked for 50.0% of the parameters, achieved 4")


@layers(lambda: dict(body=nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 4)), head=head(4)))
def Backbone(self, x: torch.Tensor) -> torch.Tensor:
    """A part that is pruned, in a model that is not."""
    return self.head(self.body(x))  # type: ignore[no-any-return]


def test_a_part_in_rounds() -> None:
    torch.manual_seed(0)
    model = Backbone()
    batches = [(images()(20), torch.arange(20) % CLASSES)]
    options = {"params": 0.5, "rounds": 2, "submodule": "body", "compensate": "none"}
    small = fxprune.compress(model, batches, progress=False, **options)
    part: Any = small.body
    plan = part.meta["fxprune"].plan
    assert parameters(part) <= 0.5 * parameters(model.body)
    assert difference(outputs(fxprune.apply(model, plan), images()(3)), outputs(small, images()(3))) < 1e-6
    assert fxprune.report(small).whole == (parameters(model), parameters(small))


@layers(lambda: dict(a=nn.Linear(6, 12), b=nn.Linear(12, 8), head=nn.Linear(8, CLASSES)))
def SaysShapes(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.a(x).relu()
    torch._assert(x.dim() == 2, f"expected two axes, got {x.shape}")
    return self.head(self.b(x).relu())


def test_shapes_that_only_a_message_reads() -> None:
    model, batch = SaysShapes().eval(), torch.randn(20, 6)
    data = [(batch, torch.arange(20) % CLASSES)]
    small = fxprune.compress(model, data, params=0.5, rounds=2, compensate="none", progress=False)
    assert fxprune.verify(model, plan_in(small), small, batch) < 1e-6


def test_places_of_a_last_head_stay_with_it() -> None:
    """Once one head is left, a round by itself would take its places apart, which the original cannot."""
    case = ZOO["attention_chunk_matmul"]
    with pytest.warns(FxpruneWarning, match=r"asked for 30.0% of the parameters, achieved .*%: the channels"):
        small = compress("attention_chunk_matmul", params=0.3, rounds=4, allocate="uniform")
    again = fxprune.apply(case.build(), plan_in(small))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in small.state_dict().items())


def test_what_no_number_of_rounds_reaches_is_said_of_the_whole() -> None:
    message = (
        r"^macs=1e-12 asks for 0.0+1% of the MACs, but 2.57\d+% is the least .*: raise macs=1e-12 to at least 0.0258$"
    )
    with pytest.raises(UnreachableError, match=message):
        compress("residual", macs=1e-12, rounds=3)
    assert fxprune.report(compress("residual", macs=0.0258, rounds=3)).budget.achieved <= 0.0258


def test_the_round_that_falls_short_says_so_and_does_not_advise_rounds() -> None:
    message = (
        r"round 1 of 2, which should leave 22.4% of the original's MACs: macs=0.223607 asks for 22.4% of the MACs, but "
        r'100.0% is the least that can be reached: pass allocate="uniform" or raise macs=0.05$'
    )
    with pytest.raises(UnreachableError, match=message):
        compress("residual", macs=0.05, rounds=2, allocate=lambda propose, _, __: np.full(len(propose), np.inf))


def test_plans_that_do_not_follow() -> None:
    first = fxprune.Plan({"a": (0, 2)}, {"a": 3}, None)
    with pytest.raises(
        PlanError, match="the second plan is for 3 channels of 'a', of which the first keeps 2: make it"
    ):
        composed(first, first)


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(PlanError, match="rounds is 0; it is a whole number, at least 1"):
        compress("mlp", rounds=0)
