"""The report: what was asked, what was achieved, and what it costs."""

from __future__ import annotations

import pytest
import torch
from helpers import parameters
from torch import nn
from zoo import ZOO, images, tensors

import fxprune
from fxprune.errors import FxpruneError
from fxprune.tracing.facts import macs

BATCHES = [(images()(20), torch.arange(20) % 5)]


def compressed(
    name: str = "residual", alpha: float = 0.5, **options: object
) -> tuple[nn.Module, nn.Module, fxprune.Report]:
    model = ZOO[name].build()
    small = fxprune.compress(model, BATCHES, alpha, progress=False, **options)
    return model, small, fxprune.report(small)


def test_the_title_is_what_the_model_was_pruned_to() -> None:
    model = ZOO["residual"].build()
    given, default, budget = (
        fxprune.report(fxprune.compress(model, BATCHES, progress=False, compensate="none", **options))
        for options in ({"alpha": 0.3}, {}, {"macs": 0.8})
    )
    assert str(given).split("\n")[0].strip() == "Residual at alpha 0.3"
    assert str(default).split("\n")[0].strip() == "Residual at alpha 0.05 (the default)"
    left = budget.macs_after / budget.macs_before
    assert str(budget).split("\n")[0].strip() == f"Residual at {left:.1%} of the MACs"


def test_parameters_are_those_of_the_two_models() -> None:
    model, small, report = compressed()
    assert report.params_before == parameters(model)
    assert report.params_after == parameters(small) < parameters(model)
    assert (report.model, report.alpha) == ("Residual", 0.5)


def test_macs_are_counted_a_sample() -> None:
    graph = fxprune.capture(ZOO["mlp"].build(), tensors(6)(2))
    assert macs(graph, tensors(6)(8)) == 6 * 16 + 16 * 12 + 12 * 5
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1, groups=4), nn.ConvTranspose2d(8, 4, 2, 2)
    )
    expected = 64 * 8 * 3 * 9 + 16 * 8 * 2 * 9 + 16 * 8 * 4 * 4
    assert macs(fxprune.capture(network, images()(2)), images()(3)) == expected


def test_what_stays_whole_is_listed_with_its_reason() -> None:
    _, _, report = compressed("mean_over_channels")
    reasons = {site: frozen.reason for frozen in report.frozen for site in frozen.sites}
    assert "mean (node mean) takes a statistic over the channels" in reasons["b"]
    assert reasons["head.2"] == "it is the model's output"
    assert "takes a statistic over the channels" in str(report)


def test_the_text_holds_the_numbers() -> None:
    _, _, report = compressed()
    text = str(report)
    assert "Residual at alpha 0.5" in text
    assert f"{report.params_before:,}" in text
    assert f"{report.params_after:,}" in text
    assert f"{report.macs_after:,}" in text
    assert "a.conv1" in text


def test_the_error_of_verify_is_in_it() -> None:
    assert 0 <= compressed()[2].error < 1e-4
    assert compressed(verify=False)[2].error is None
    assert "not run" in str(compressed(verify=False)[2])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), fxprune.capture(nn.Sequential(nn.Linear(6, 3)), tensors(6)(2))])
def test_other_models_have_none(model: nn.Module) -> None:
    with pytest.raises(FxpruneError, match=r"has no report: it did not come from fxprune.compress or fxprune.apply"):
        fxprune.report(model)
