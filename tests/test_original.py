"""What scoring measures of the original on its way: loss, accuracy, and the warning near chance."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import squares
from torch import Tensor, nn
from zoo import CLASSES, ZOO, images

import fxprune
from fxprune.errors import FxpruneWarning
from fxprune.scoring.objective import GatedPart
from fxprune.scoring.original import chance, classes_of

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()


def batches(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True))


def about(model: nn.Module, loader: Any, **options: Any) -> dict[str, Any]:
    return dict(fxprune.score(model, loader, progress=False, **options).about)


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, wrong: int = 0) -> Tensor:
    """The classes that a model gives, all but so many of them."""
    found = model(x).argmax(1)
    found[:wrong] = (found[:wrong] + 1) % model(x[:1]).shape[1]
    return found


def test_loss_and_accuracy_are_those_of_the_model_over_all_samples() -> None:
    model = ZOO["residual"].build().eval()
    x = images()(30)
    y = answers(model, x, wrong=9)
    found = about(model, batches(x, y, 12, 13, 5))
    assert found["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert (found["accuracy"], found["outputs"]) == (21 / 30, CLASSES)


def test_they_take_no_further_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], GatedPart.forward

    def counted(self: GatedPart, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GatedPart, "forward", counted)
    assert "accuracy" in about(network(), batches(X, answers(network(), X), 100, 100, 100))
    assert len(calls) == 3


def on_pixels(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Masks that a model gives, half of the pixels left out and a quarter of the others wrong."""
    y = answers(model, x)
    y[:, :4] = -100
    y[:, 4:6, :4] = (y[:, 4:6, :4] + 1) % 5
    return x, y


def test_positions_count_and_ignored_ones_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    x, y = on_pixels(model, images(size=8)(6))
    found = about(model, [(x, y)])
    assert (found["accuracy"], found["outputs"]) == (0.75, 5)
    loss = nn.CrossEntropyLoss(ignore_index=255)
    y = torch.where(y < 0, 255, y)
    assert about(model, [(x, y)], loss=loss)["accuracy"] == 0.75
    assert "accuracy" not in about(model, [(x, y)], loss=lambda o, t: loss(o, t))  # 255 is no class that is known of


class Steps(nn.Module):
    """A model of steps whose classes lie on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Named(nn.Module):
    """A model that gives a dict of its logits and more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).relu()
        return {"logits": self.last(hidden), "hidden": hidden}


def shifted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten())


@pytest.mark.parametrize(
    ("model", "batch", "options"),
    [
        (Steps(), (torch.randn(5, 4, 6), torch.zeros(5, 4).long()), {"loss": shifted}),
        (Steps(), (torch.randn(5, 3, 6), torch.zeros(5, 3).long()), {"loss": shifted}),  # as many steps as classes
        (network(), (X[:9], torch.zeros(9)), {"loss": squares}),
        (network(), (X[:9], torch.full((9,), 4)), {"loss": squares}),
        (network(), (X[:9], torch.full((9, 4), 0.25)), {}),
        (network(1), (X[:9], torch.zeros(9, dtype=torch.int64)), {"loss": squares}),
        (network(), (X[:9], torch.zeros(9).bool()), {"loss": squares}),
    ],
    ids=["steps", "square", "floats", "no class", "probabilities", "one output", "flags"],
)
def test_what_are_no_class_numbers_have_a_loss_alone(model: nn.Module, batch: Any, options: dict[str, Any]) -> None:
    found = about(model, [batch], **options)
    loss = options.get("loss", F.cross_entropy)
    assert found["loss"] == pytest.approx(loss(model(batch[0]), batch[1]).item(), rel=1e-4)
    assert not found.keys() & {"accuracy", "outputs"}


def test_one_batch_without_class_numbers_is_enough() -> None:
    model, y = network(), answers(network(), X)
    loader = [(X[:50], y[:50]), (X[50:60], torch.full((10,), 7)), (X[60:], y[60:])]
    assert "accuracy" not in about(model, loader, loss=squares)


def test_logits_in_a_dict() -> None:
    model = Named().eval()
    y = model(X[:20])["logits"].argmax(1)
    found = about(model, [(X[:20], y)], loss=lambda output, target: F.cross_entropy(output["logits"], target))
    assert (found["accuracy"], found["outputs"]) == (1.0, 3)


@pytest.mark.parametrize(
    ("run", "accuracy"),
    [
        (lambda model, x, y: F.cross_entropy(model(x), y), 0.9),
        (lambda model, x, y: F.cross_entropy(model(x) + model(2 * x), y), None),
    ],
    ids=["one call", "two calls"],
)
def test_with_run(run: Callable[..., Tensor], accuracy: float | None) -> None:
    model = network()
    y = answers(model, X, wrong=30)
    found = about(model, batches(X, y, 150, 150), run=run)
    assert found["loss"] == pytest.approx(run(model, X, y).item(), rel=1e-4)
    assert found.get("accuracy") == accuracy
    assert not model._forward_hooks


def test_of_a_part_it_is_the_whole_models() -> None:
    model = nn.Sequential(network(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    y = answers(model, X, wrong=75)
    found = about(model, [(X, y)], submodule="0")
    assert (found["accuracy"], found["outputs"]) == (0.75, 3)


def test_near_chance_there_is_a_warning_at_the_callers_line(tmp_path: Path) -> None:
    y = torch.arange(300) % 4
    with pytest.warns(FxpruneWarning) as caught:
        scores = fxprune.score(network(), batches(X, y, 200, 100), progress=False)
    right = scores.about["accuracy"]
    assert str(caught[0].message) == (
        f"the original is right on {right:.1%} of these 300 samples, no more than guessing among 4 classes would be: "
        "wrong preprocessing, labels or weights?"
    )
    assert caught[0].filename == __file__
    scores.save(tmp_path / "scores.npz")
    assert fxprune.Scores.load(tmp_path / "scores.npz").about == scores.about


def test_a_loss_above_that_of_guessing_warns_too() -> None:
    """As of images in another range, of which a trained network is surely wrong."""
    x = torch.randn(200, 4)
    y = torch.where(torch.arange(200) % 3 == 0, x.argmax(1), x.argmin(1))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(9 * torch.eye(4))
            layer.bias.zero_()
    right = float((model(x).argmax(1) == y).float().mean())
    with pytest.warns(FxpruneWarning, match=rf"right on {right:.1%} of these 200 .* the 1\.39 of guessing among 4"):
        fxprune.score(model, [(x, y)], progress=False)
    assert chance(4, 200) < right < 0.5


@pytest.mark.parametrize("right", [110, 160, 290])
def test_clearly_above_chance_there_is_none(right: int) -> None:
    """Two standard errors above a quarter of 300 samples are 90 right ones."""
    model = network()
    assert about(model, [(X, answers(model, X, wrong=300 - right))])["accuracy"] == right / 300


def test_few_samples_say_nothing_about_chance() -> None:
    model = network()
    y = answers(model, X, wrong=300)
    assert about(model, [(X[:99], y[:99])])["accuracy"] == 0
    with pytest.warns(FxpruneWarning, match=r"right on 0\.0% of these 100 samples"):
        about(model, [(X[:100], y[:100])])


def test_a_model_that_was_pruned_before_is_called_so() -> None:
    model = network()
    plan = fxprune.Scores.random(model, X[:2]).plan(0.3)
    small = fxprune.apply(model, plan)
    y = answers(small, X, wrong=300)
    with pytest.warns(
        FxpruneWarning, match=r"the model as pruned so far is right on 0\.0% .* it lost more than it can"
    ):
        about(small, [(X, y)])


def test_the_report_has_what_the_first_round_measured() -> None:
    model = network()
    y = answers(model, X, wrong=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxpruneWarning)
        small = fxprune.compress(model, batches(X, y, 200, 100), macs=0.5, rounds=3, compensate="none", progress=False)
    found = fxprune.report(small)
    scores = fxprune.score(model, batches(X, y, 200, 100), progress=False)
    assert found.calibration is not None
    assert (found.calibration.samples, found.calibration.accuracy) == (300, 0.8)
    assert found.calibration.loss == scores.about["loss"]
    assert "the original on 300 calibration samples: loss" in str(found)
    assert "right on 80.0%" in str(found)
    assert fxprune.report(fxprune.apply(model, scores.plan(0.1))).calibration is None
    assert fxprune.report(fxprune.apply(model, scores.plan(0.1), scores=scores)).calibration == found.calibration


@pytest.mark.parametrize(
    "output",
    [torch.zeros(4, 3).to_sparse(), torch.zeros(4, 3).long(), torch.zeros(4), [torch.zeros(4, 3)], torch.zeros(3, 3)],
    ids=["sparse", "integers", "one axis", "a list", "other samples"],
)
def test_what_are_no_logits(output: Any) -> None:
    assert classes_of(output, torch.zeros(4, dtype=torch.int64), squares) == 0


def test_without_a_terminal_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fxprune.score(network(), batches(X, answers(network(), X)), progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shift", [1, 2])
def test_an_accuracy_is_left_out_where_the_loss_takes_other_numbers(shift: int) -> None:
    """Class numbers that the loss counts in another way than torch's are no classes of the outputs."""
    model = network()
    y = answers(model, X)
    found = about(model, batches(X, (y + shift) % 4), loss=lambda out, t: F.cross_entropy(out, (t - shift) % 4))
    assert found["loss"] == pytest.approx(F.cross_entropy(model(X), y).item(), rel=1e-5)
    assert "accuracy" not in found
    same = about(model, batches(X, y), loss=lambda out, t: F.cross_entropy(out, t, label_smoothing=0.1))
    assert same["accuracy"] == 1
