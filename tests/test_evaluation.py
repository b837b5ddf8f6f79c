"""A figure of the caller's in the report: before and after, shown, saved and read back."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, images

import fxprune
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.reporting.html.page import page
from fxprune.reporting.records import Calibration, Evaluation

BATCHES = [(images()(20), torch.arange(20) % 5)]


def accuracy(model: nn.Module, targets: Tensor = BATCHES[0][1]) -> float:
    """The share that is right, of a model in eval mode without gradients."""
    assert not model.training
    assert not torch.is_grad_enabled()
    return float((model(BATCHES[0][0]).argmax(1) == targets).float().mean())


@pytest.fixture(scope="module")
def once() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = ZOO["residual"].build().train()
    return model, fxprune.compress(model, BATCHES, macs=0.5, progress=False)


@pytest.fixture
def pruned(once: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model and its smaller one, which no other test has had in its hands."""
    return copy.deepcopy(once)


def test_before_and_after_stay_in_the_report(pruned: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, small = pruned
    found = fxprune.report(small, evaluate=accuracy, original=model)
    before, after = (float((m.eval()(BATCHES[0][0]).argmax(1) == BATCHES[0][1]).float().mean()) for m in pruned)
    assert found.evaluation == Evaluation("accuracy", before, after)
    assert fxprune.report(small) == found
    assert re.search(rf"accuracy +│ +{before:.4g} │ +{after:.4g} │", str(found))
    assert f"from {before:.1%}" in page(found)
    fxprune.save(small, tmp_path / "small.safetensors")
    assert fxprune.report(fxprune.load(tmp_path / "small.safetensors", model)) == found
    assert from_plain(fxprune.Report, json.loads(json.dumps(found.to_dict()))) == found
    other = fxprune.report(small, evaluate=lambda _: 7)
    assert other.evaluation == Evaluation("evaluation", None, 7.0)
    assert "from" not in page(other)[page(other).index(">evaluation<") :].split("</div></div>")[0]
    figures = {figure.name: figure for figure in found.compare(other).figures}
    assert (figures["accuracy"].before, figures["accuracy"].first) == (before, after)
    assert figures["evaluation"].second == 7


def test_modes_are_left_as_they_were(pruned: tuple[nn.Module, nn.Module]) -> None:
    model, small = pruned
    fxprune.report(small, evaluate=accuracy, original=model)
    assert all(module.training for each in pruned for module in each.modules())


@pytest.mark.parametrize(
    ("evaluate", "name", "value"),
    [
        (partial(accuracy, targets=torch.full((20,), -1)), "accuracy", 0.0),
        (lambda _: torch.tensor([0.5]), "evaluation", 0.5),
        (lambda _: np.float32(0.25), "evaluation", 0.25),
        (type("Metric", (), {"__call__": lambda self, model: 3})(), "Metric", 3.0),
    ],
    ids=["partial", "tensor", "numpy", "object"],
)
def test_functions_and_numbers_of_any_kind(
    pruned: tuple[nn.Module, nn.Module], evaluate: Any, name: str, value: float
) -> None:
    assert fxprune.report(pruned[1], evaluate=evaluate).evaluation == Evaluation(name, None, value)


def broken(model: nn.Module) -> float:
    raise ValueError(f"no images for {type(model).__name__}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"evaluate": 3},
            CalibrationError,
            r"evaluate is 3; it is a function, evaluate\(model\), which gives a number",
        ),
        ({"evaluate": accuracy, "original": 3}, FxpruneError, "original is 3; give a model"),
        ({"original": nn.Linear(2, 2)}, FxpruneError, "original= is given without evaluate=: name the function"),
        ({"evaluate": broken}, CalibrationError, r"evaluate= fails on the smaller model \(ValueError: no images for"),
        ({"evaluate": broken, "original": nn.Linear(2, 2)}, CalibrationError, "fails on the original .* for Linear"),
        (
            {"evaluate": lambda _: "good"},
            CalibrationError,
            "evaluate= gives 'good' for the smaller model; it returns a n",
        ),
        ({"evaluate": lambda _: torch.zeros(2)}, CalibrationError, "evaluate= gives a Tensor for the smaller model"),
        ({"evaluate": lambda _: float("nan")}, CalibrationError, "evaluate= gives nan for the smaller model"),
    ],
)
def test_what_cannot_be_evaluated(
    pruned: tuple[nn.Module, nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = fxprune.report(pruned[1])
    with pytest.raises(error, match=message):
        fxprune.report(pruned[1], **options)
    assert fxprune.report(pruned[1]) == before


def test_reports_written_before_there_were_such_figures(pruned: tuple[nn.Module, nn.Module]) -> None:
    found = fxprune.report(pruned[1], evaluate=accuracy)
    content = found.to_dict()
    del content["evaluation"], content["calibration"]
    old = from_plain(fxprune.Report, json.loads(json.dumps(content)))
    assert (old.evaluation, old.calibration) == (None, None)
    assert found.calibration is not None
    assert str(found.calibration) in str(found)
    assert str(found.calibration) in page(found)
    assert str(found.calibration) not in str(old) + page(old)


def test_a_calibration_says_what_was_measured() -> None:
    assert str(Calibration(1, 2.34567)) == (
        "the original on 1 calibration sample: loss 2.35; these are few samples, give some hundred"
    )
    assert str(Calibration(1000, 0.0, 1.0, 10)) == "the original on 1,000 calibration samples: loss 0, right on 100.0%"


def test_every_part_has_the_figure_of_the_whole() -> None:
    model = nn.Sequential(ZOO["residual"].build(), nn.Linear(5, 5)).eval()
    small = fxprune.compress(model, BATCHES, 0.3, submodule="0", progress=False)
    fxprune.report(small, evaluate=lambda m: len(list(m.modules())))
    assert fxprune.report(small[0]).evaluation == Evaluation("evaluation", None, float(len(list(small.modules()))))
