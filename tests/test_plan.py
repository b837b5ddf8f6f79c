"""Plans: what they hold, how they travel, and which ones are refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, outputs
from zoo import ZOO

import fxprune
from fxprune.errors import PlanError


def scores_of(name: str, seed: int = 0) -> fxprune.Scores:
    case = ZOO[name]
    return fxprune.Scores.random(case.build(), case.example(2), seed=seed)


def test_a_plan_names_every_site_with_rising_indices() -> None:
    plan = scores_of("residual").plan(alpha=0.5)
    assert plan.widths == {
        "stem": 8,
        "a.conv1": 8,
        "a.conv2": 8,
        "b.conv1": 12,
        "b.conv2": 12,
        "down.0": 12,
        "head.2": 5,
    }
    assert plan.alpha == 0.5
    assert all(list(kept) == sorted(set(kept)) for kept in plan.keep.values())
    assert plan.keep["stem"] == plan.keep["a.conv2"]
    assert plan.keep["b.conv2"] == plan.keep["down.0"]
    assert plan.keep["head.2"] == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("name", ["residual", "dict_input", "several_inputs", "shuffle_units", "functional_conv"])
def test_saved_plans_load_as_they_were(tmp_path: Path, name: str) -> None:
    plan = scores_of(name).plan(alpha=0.4)
    plan.save(tmp_path / "plan.json")
    assert fxprune.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.wide
def test_a_plan_is_applied_in_another_process(tmp_path: Path) -> None:
    """To a freshly built model, without scores, loader or example."""
    name = "dict_input"
    case = ZOO[name]
    plan = scores_of(name).plan(alpha=0.5)
    plan.save(tmp_path / "plan.json")
    code = (
        "import sys, torch, fxprune\n"
        "from helpers import outputs\n"
        "from zoo import ZOO\n"
        f"case = ZOO[{name!r}]\n"
        "small = fxprune.apply(case.build(), fxprune.Plan.load(sys.argv[1]))\n"
        "torch.save(outputs(small, case.example(3)), sys.argv[2])\n"
    )
    paths = [str(Path(__file__).parent), str(Path(fxprune.__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"]
    subprocess.run([*command, str(tmp_path / "plan.json"), str(tmp_path / "out.pt")], check=True)
    here = outputs(fxprune.apply(case.build(), plan), case.example(3))
    assert difference(here, torch.load(tmp_path / "out.pt", weights_only=True)) < 1e-6


def test_something_always_stays() -> None:
    for name in ("grouped_chain", "split_spellings", "channel_slices", "stack_and_unbind"):
        case, plan = ZOO[name], scores_of(name).plan(alpha=1.0)
        assert all(len(kept) >= 1 for kept in plan.keep.values())
        outputs(fxprune.apply(case.build(), plan), case.example(2))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_lies_between_0_and_1(alpha: float) -> None:
    with pytest.raises(PlanError, match=f"alpha is {alpha}; it is a share of units and lies between 0 and 1"):
        scores_of("mlp").plan(alpha=alpha)


# -- files that are no plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"alpha": 0.1}',
        '{"fxprune_plan": 1}',
        '{"fxprune_plan": 1, "alpha": 1, "example": 0, "sites": []}',
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=r"plan.json is not a plan that Plan.save wrote"):
        fxprune.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"of": 3, "keep": [2, 1]}, "channels of '0' are not rising indices below its width 3"),
        ({"of": 3, "keep": [1, 1]}, "are not rising indices"),
        ({"of": 3, "keep": [0, 3]}, "are not rising indices below its width 3"),
        ({"of": 3, "keep": [-1, 0]}, "are not rising indices"),
        ({"of": 3, "keep": []}, "keeps 0 of 3 channels of '0': a layer keeps at least one"),
        ({"of": "x", "keep": [0]}, "is not a plan that Plan.save wrote"),
        ({"of": 3}, "is not a plan that Plan.save wrote"),
        ({"of": 3, "keep": 1}, "is not a plan that Plan.save wrote"),
    ],
)
def test_a_file_with_a_wrong_site(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    content = {
        "fxprune_plan": 1,
        "alpha": None,
        "example": {"tensor": [2, 6], "dtype": "float32"},
        "sites": {"0": entry},
    }
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        fxprune.Plan.load(tmp_path / "plan.json")


# -- plans that contradict the model -----------------------------------------------------------------------------------


def changed(name: str, change: Callable[[dict[str, tuple[int, ...]]], None], **fields: Any) -> fxprune.Plan:
    """The plan that keeps all of a zoo model, with a change."""
    plan = scores_of(name).plan(alpha=0.0)
    keep = {site: tuple(range(width)) for site, width in plan.widths.items()}
    change(keep)
    return dataclasses.replace(plan, keep=keep, **fields)


def refused(name: str, plan: fxprune.Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxprune.apply(ZOO[name].build(), plan)


def test_a_plan_of_part_of_the_sites_keeps_the_rest() -> None:
    plan = fxprune.Plan({"a.conv1": (0, 1, 5)}, {"a.conv1": 8}, scores_of("residual").example)
    small = fxprune.apply(ZOO["residual"].build(), plan)
    assert small.a["conv1"].weight.shape == (3, 8, 3, 3)
    assert small.a["conv2"].weight.shape == (8, 3, 3, 3)
    assert small.b["conv1"].weight.shape == (12, 8, 3, 3)


def test_a_plan_for_a_layer_that_is_not_there() -> None:
    plan = changed("mlp", lambda keep: keep.update({"9": (0,)}))
    refused("mlp", plan, "the plan names '9', which has no channels there: apply it to the model that it was made for")


def test_a_plan_for_another_width() -> None:
    plan = changed("mlp", lambda keep: None)
    plan = dataclasses.replace(plan, widths={**plan.widths, "0": 32}, keep={**plan.keep, "0": tuple(range(32))})
    refused("mlp", plan, "the plan was made for 32 channels of '0', the model has 16")


def test_a_plan_that_tears_a_unit() -> None:
    plan = changed("residual", lambda keep: keep.update({"stem": (0, 1, 2, 3, 4, 5, 6)}))
    refused(
        "residual",
        plan,
        r"keeps channel 7 of 'a.conv2' but drops channel 7 of 'stem', which must be kept or removed tog.*1 dropped",
    )


def test_a_plan_that_drops_an_output() -> None:
    plan = changed("mlp", lambda keep: keep.update({"4": (0, 1, 2, 3)}))
    refused(
        "mlp",
        plan,
        r"drops channel 4 of '4' \(4 of 5 kept\), which cannot be removed \(it is the model's output\): keep it",
    )


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 16), (0, 0)])
def test_a_plan_with_wrong_indices(kept: tuple[int, ...]) -> None:
    plan = changed("mlp", lambda keep: keep.update({"0": kept}))
    refused(
        "mlp",
        plan,
        "keeps 0 of 16 channels of '0'" if not kept else "channels of '0' are not rising indices below its width 16",
    )


def test_a_plan_that_leaves_a_reader_without_inputs() -> None:
    """Of the twelve channels of one layer, the four that one reader reads."""
    plan = changed("split_spellings", lambda keep: keep.update({"a": tuple(range(4, 12))}))
    refused("split_spellings", plan, r"drops all 4 units of a slice that the model reads \(of 'a'\): keep at least one")


def test_an_example_of_an_unknown_dtype(tmp_path: Path) -> None:
    plan = dataclasses.replace(scores_of("mlp").plan(alpha=0.4), example={"tensor": [2, 6], "dtype": "float17"})
    with pytest.raises(PlanError, match="names the dtype 'float17', which torch does not have"):
        fxprune.apply(ZOO["mlp"].build(), plan)
