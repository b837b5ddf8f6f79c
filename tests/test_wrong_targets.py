"""Targets that a loss does not take are named for what they are, with a loss= that takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.caller.example import as_fields
from fxprune.errors import CalibrationError
from fxprune.scoring import wrong_targets

SAMPLES, CLASSES = 6, 4
X = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % CLASSES
ONE_HOT = F.one_hot(Y, CLASSES)


class Net(nn.Module):
    """Two layers, and a function that makes the output of their logits, (samples, CLASSES)."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda x: x, width: int = CLASSES) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Linear(5, 8), nn.Linear(8, width), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.last(self.first(x).relu()))


class Pair(NamedTuple):
    score: Tensor
    aux: Tensor


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


def steps(logits: Tensor) -> Tensor:
    """Three steps of each sample: (samples, 3, classes)."""
    return torch.stack([logits, logits * 2, logits * 3], 1)


def maps(logits: Tensor) -> Tensor:
    return logits[:, :, None, None].expand(-1, -1, 2, 2)


FLAT = Net(lambda x: steps(x).flatten(0, 1))
WRONG: dict[str, tuple[nn.Module, Any, str, str]] = {  # the model, the targets, what they are, the loss that takes them
    "several classes as floats": (
        Net(), (ONE_HOT + ONE_HOT.roll(1, 1)).float(), "name several classes a sample",
        "F.binary_cross_entropy_with_logits(out, y)",
    ),
    "a regression of several numbers": (
        Net(), X[:, :CLASSES], "have the shape of the output and are no probabilities of classes", "F.mse_loss(out, y)",
    ),
    "one-hot": (Net(), ONE_HOT, r"are one-hot, of shape \(6, 4\) and dtype int64", "F.cross_entropy(out, y.argmax(1))"),
    "booleans": (Net(), ONE_HOT.bool(), "are one-hot, .* bool", "F.cross_entropy(out, y.long().argmax(1))"),
    "several classes": (
        Net(), torch.ones(SAMPLES, CLASSES).long(), "name several classes a sample",
        "F.binary_cross_entropy_with_logits(out, y.float())",
    ),
    "floats": (Net(), Y.float(), "are class numbers of dtype float32", "F.cross_entropy(out, y.long())"),
    "int32": (Net(), Y.int(), "are class numbers of dtype int32", "F.cross_entropy(out, y.long())"),
    "a column": (Net(), Y[:, None], r"have shape \(6, 1\), and .* takes \(6,\)", "F.cross_entropy(out, y.squeeze(1))"),
    "a column of floats": (Net(), Y[:, None].float(), r"shape \(6, 1\)", "F.cross_entropy(out, y.squeeze(1).long())"),
    "from one": (Net(), Y + 1, "hold class 4, .* 4 classes, 0 to 3; they count from 1", "F.cross_entropy(out, y - 1)"),
    "negative": (Net(), Y - 1, "hold class -1, .* 4 classes", "F.cross_entropy(out, y, ignore_index=-1)"),
    "several negative": (Net(), Y - 2, "hold class -2", "F.cross_entropy(out, y.clamp(min=-1), ignore_index=-1)"),
    "a list": (
        Net(), Y.tolist(), "are of type list, not a tensor",
        "F.cross_entropy(out, torch.as_tensor(y, device=out.device))",
    ),
    "an array": (
        Net(), Y.int().numpy(), "are of type ndarray, not a tensor",
        "F.cross_entropy(out, torch.as_tensor(y, device=out.device).long())",
    ),
    "a dict": (Net(), {"a": Y}, r'are a dict with \["a"\] of shape \(6,\)', 'F.cross_entropy(out, y["a"])'),
    "a tuple output": (
        Net(lambda x: (x, x[:, :2])), Y, r"output is a tuple with \[0\] of shape \(6, 4\), \[1\] of shape \(6, 2\)",
        "F.cross_entropy(out[0], y)",
    ),
    "a later entry": (Net(lambda x: (x[:, :2], x)), Y, "the output is a tuple", "F.cross_entropy(out[1], y)"),
    "a dict output": (
        Net(lambda x: {"aux": x, "logits": x}), Y, "the output is a dict", 'F.cross_entropy(out["logits"], y)'
    ),
    "a dict without logits": (Net(lambda x: {"out": x}), Y, "the output is a dict", 'F.cross_entropy(out["out"], y)'),
    "a dataclass output": (Net(lambda x: Output(x, x)), Y, "the output is an Output", "F.cross_entropy(out.logits, y)"),
    "a named tuple": (Net(lambda x: Pair(x, x)), Y, "the output is a Pair", "F.cross_entropy(out[0], y)"),
    "both": (
        Net(lambda x: {"logits": x}), ONE_HOT, "the targets are one-hot", 'F.cross_entropy(out["logits"], y.argmax(1))'
    ),
    "classes last": (
        Net(steps), Y[:, None].repeat(1, 3), "the output has its classes last", "F.cross_entropy(out.movedim(-1, 1), y)"
    ),
    "positions as rows": (FLAT, Y[:, None].repeat(1, 3), "has as many rows", "F.cross_entropy(out, y.flatten())"),
    "larger maps": (
        Net(maps), Y[:, None, None].repeat(1, 4, 4), r"are maps of \(4, 4\), and the output's are \(2, 2\)",
        "F.cross_entropy(F.interpolate(out, y.shape[1:]), y)",
    ),
    "a regression": (
        Net(width=1), X[:, 0], r"one number a sample, of shape \(6, 1\)", "F.mse_loss(out.squeeze(1), y.float())"
    ),
    "a regression of columns": (Net(width=1), X[:, :1], "one number a sample", "F.mse_loss(out, y.float())"),
    "a regression without an axis": (Net(lambda x: x[:, 0]), X[:, 0], "number a sample", "F.mse_loss(out, y.float())"),
    "yes or no": (
        Net(width=1), Y % 2, "one number a sample", "F.binary_cross_entropy_with_logits(out.squeeze(1), y.float())"
    ),
}  # fmt: skip
BEYOND: dict[str, tuple[nn.Module, Any, str]] = {  # those without a loss that takes them
    "another class": (Net(), Y + 14, "hold class 17, and the output has 4 classes, 0 to 3.*: give the labels that the"),
    "fewer": (Net(), Y[:5], r"have shape \(5,\), and the output has 6 rows.*: give one target for each sample"),
    "fractions": (Net(), X[:, 0], "are fractions, and the output has 4 numbers a sample"),
    "names": (Net(), ["cat"] * SAMPLES, "are names of classes.*: give their numbers, from 0, by unpack="),
    "objects": (Net(), [{"boxes": Y}] * SAMPLES, r'are a list with \[0\]\["boxes"\] of shape \(6,\), .*, \.\.\.: pass'),
    "maps of one class": (Net(maps), Y, r"of shape \(6, 4, 2, 2\), and the targets are an int64 tensor of shape \(6"),
    "ignored": (Net(), torch.full((SAMPLES,), -100), "is nan: all its targets are -100, which cross-entropy ignores"),
}  # fmt: skip


def score(model: nn.Module, targets: Any, **options: Any) -> fxprune.Scores:
    return fxprune.score(model, [(X, targets)] * 2, progress=False, **options)


@pytest.mark.parametrize("name", WRONG)
def test_they_are_named_and_the_loss_in_the_message_takes_them(name: str) -> None:
    model, targets, what, loss = WRONG[name]
    with pytest.raises(CalibrationError, match=what) as caught:
        score(model, targets)
    assert str(caught.value).endswith(f": pass loss=lambda out, y: {loss}")
    pasted = eval(f"lambda out, y: {loss}", {"F": F, "torch": torch})
    assert score(model, targets, loss=pasted).about["samples"] == SAMPLES * 2


@pytest.mark.parametrize("name", BEYOND)
def test_they_are_named_where_no_loss_takes_them(name: str) -> None:
    model, targets, what = BEYOND[name]
    with pytest.raises(CalibrationError, match=what) as caught:
        score(model, targets)
    assert "lambda" not in str(caught.value)


@pytest.mark.parametrize("batch", [X, (X,), (X, None)], ids=["a tensor", "a tuple", "None"])
def test_a_loader_without_targets_is_not_blamed_on_the_loss(batch: Any) -> None:
    with pytest.raises(
        CalibrationError, match=r"batch 0 has no targets, .*: give batches \(inputs, targets\)"
    ) as caught:
        fxprune.score(Net(), [batch], progress=False)
    assert "loss=" not in str(caught.value)


def test_a_loss_of_the_users_that_fails_is_told_what_it_was_given() -> None:
    with pytest.raises(
        CalibrationError, match=r"RuntimeError.*; the output is a float32 tensor of shape \(6, 4\), and"
    ):
        score(Net(), ONE_HOT, loss=lambda out, y: F.mse_loss(out, y.view(3)))


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_of_the_users_may_take_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at where a loss does not fail."""
    for check in ("_parts", "_one_number", "_out_of_range"):
        monkeypatch.setattr(wrong_targets, check, None)
    model, targets, *_ = WRONG[name]

    def loss(output: Any, y: Any) -> Tensor:
        assert y is not None
        return sum(leaf.square().mean() for leaf in tree_leaves(as_fields(output)))

    assert score(model, targets, loss=loss).about["samples"] == SAMPLES * 2


def test_nothing_is_looked_at_where_cross_entropy_takes_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("_parts", "_out_of_range"):
        monkeypatch.setattr(wrong_targets, check, None)
    assert score(Net(), Y).about["samples"] == score(Net(), ONE_HOT.float()).about["samples"] == SAMPLES * 2


def test_a_class_that_is_not_there_is_found_before_a_device_asserts() -> None:
    class Elsewhere(Tensor):
        is_cpu = False

    out = torch.zeros(SAMPLES, CLASSES).as_subclass(Elsewhere)
    wrong_targets.check_classes(F.cross_entropy, out, Y, "batch 0")
    with pytest.raises(CalibrationError, match="the targets of batch 0 hold class 9, and the output has 4 classes"):
        wrong_targets.check_classes(F.cross_entropy, out, Y + 6, "batch 0")


def test_fine_tuning_says_the_same() -> None:
    pytest.importorskip("lightning_fabric")
    small = fxprune.compress(Net(), [(X, Y)], progress=False)
    wrong = [(X, ONE_HOT)]
    with pytest.raises(CalibrationError, match=r"the targets are one-hot.*: pass loss=lambda out, y: F.cross_entropy"):
        fxprune.finetune(small, train_loader=wrong, val_loader=wrong, epochs=1, progress=False)


@pytest.mark.parametrize(
    ("batch", "unpack"),
    [
        ({"image": X, "fine_label": Y}, "(batch['image'], batch['fine_label'])"),
        ({"x": X, "y": Y}, "(batch['x'], batch['y'])"),
        ({"x": X, "label": Y, "target": Y}, "(batch['x'], batch['label'])"),
        ((X, Y, Y), "(batch[0], batch[1])"),
    ],
)
def test_the_unpack_in_the_message_takes_the_batches(batch: Any, unpack: str) -> None:
    line = f"unpack=lambda batch: {unpack}"
    with pytest.raises(CalibrationError, match=re.escape(line)):
        fxprune.score(Net(), [batch], progress=False)
    pasted = eval(line.removeprefix("unpack="))
    assert fxprune.score(Net(), [batch], unpack=pasted, progress=False).about["samples"] == SAMPLES


def test_probabilities_are_targets_of_cross_entropy() -> None:
    found = fxprune.score(Net(), [(X, ONE_HOT.float() * 0.7 + 0.075)], progress=False)
    assert "accuracy" not in found.about


def test_fractions_are_not_turned_into_classes() -> None:
    with pytest.raises(CalibrationError, match=r"fractions of shape \(6, 1\).* such as F.mse_loss for a regression"):
        fxprune.score(Net(), [(X, X[:, :1])], progress=False)


def test_targets_that_are_all_negative_are_not_to_be_ignored() -> None:
    """A loss that ignores them is not a number."""
    with pytest.raises(CalibrationError, match=r"the targets are all negative, -2 the lowest.*or no such batch"):
        fxprune.score(Net(), [(X, torch.tensor([-1, -2] * 3))], progress=False)
