"""Fine-tuning: what it gives back, how it is resumed, and what is said where it cannot be done."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import BATCHES as DETECTED
from detectors import OPTIONS, detector, run
from helpers import outputs, picture, same_picture, same_state, squares, storages
from nets import layers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO, images

import fxprune
from fxprune.caller.installation import install
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.recovery.distillation import Distillation, classes_last

pytest.importorskip("lightning_fabric")
DIGITS = pytest.importorskip("sklearn.datasets").load_digits()
PIXELS, LABELS = torch.from_numpy(DIGITS.images[:, None] / 8 - 1).float(), torch.from_numpy(DIGITS.target)
BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5)]


@layers(lambda: dict(
    a=nn.Conv2d(1, 12, 3), norm=nn.BatchNorm2d(12), b=nn.Conv2d(12, 16, 3), noise=nn.Dropout(0.2),
    head=nn.Linear(16 * 16, 10),
))  # fmt: skip
def Digits(self, x: Tensor) -> Tensor:
    """A small network with BatchNorm and dropout, so that buffers and random numbers matter."""
    x = F.relu(self.norm(self.a(x)))
    y: Tensor = self.head(self.noise(F.relu(self.b(x)).flatten(1)))
    return y


def loaders(seed: int = 5) -> tuple[Any, Any]:
    """Shuffled training batches of digits, with a generator of their own, and others to validate on."""
    train, val = TensorDataset(PIXELS[:600], LABELS[:600]), TensorDataset(PIXELS[1200:], LABELS[1200:])
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(train, batch_size=64, shuffle=True, generator=generator), DataLoader(val, batch_size=256)


def accuracy(output: Any, targets: Tensor) -> Tensor:
    return (output.argmax(1) == targets).float().mean()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that was trained for a while."""
    torch.manual_seed(0)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for x, y in zip(PIXELS[:1200].split(64), LABELS[:1200].split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def small(trained: nn.Module) -> nn.Module:
    """The same, pruned hard."""
    return fxprune.compress(
        trained,
        [(PIXELS[:200], LABELS[:200])],
        0.6,
        propose="separability",
        protect="taylor",
        allocate="tod-by-group",
        compensate="none",
        progress=False,
    )


def tune(model: nn.Module, *data: Any, **options: Any) -> Any:
    return fxprune.finetune(model, *(data or loaders()), progress=False, **options)


def done(model: nn.Module) -> fxprune.Finetuning:
    found = fxprune.report(model).finetuned
    assert found is not None
    return found


def test_accuracy_comes_back(small: nn.Module) -> None:
    before = picture(small)
    tuned = tune(small, epochs=3, lr=0.05, metric=accuracy)
    assert same_picture(before, picture(small))
    assert storages(tuned).isdisjoint(storages(small))
    notes = done(tuned)
    measured = [float(accuracy(outputs(model, PIXELS[1200:])[0], LABELS[1200:])) for model in (small, tuned)]
    assert measured == pytest.approx([notes.metrics[0], notes.metrics[notes.best]], abs=1e-6)
    assert measured[1] > max(measured[0] + 0.05, 0.85)
    assert (notes.epochs, notes.ran, len(notes.val_losses), notes.precision) == (3, 3, 4, "32-true")
    assert notes.train_losses[-1] < notes.train_losses[0]


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_frozen_parameters_stay(small: nn.Module, training: bool) -> None:
    given = copy.deepcopy(small).double().train(training)
    given.get_parameter("a.weight").requires_grad_(False)
    train, val = ([(x.double(), y) for x, y in batches] for batches in loaders())
    tuned = tune(given, train, val, epochs=1)
    assert {module.training for module in tuned.modules()} == {training}
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float64}
    assert torch.equal(tuned.get_parameter("a.weight"), given.get_parameter("a.weight"))
    assert not torch.equal(tuned.get_parameter("b.weight"), given.get_parameter("b.weight"))


def test_mixed_precision_where_it_is_asked_for(small: nn.Module) -> None:
    tuned = tune(small, epochs=1, precision="bf16-mixed")
    assert done(tuned).precision == "bf16-mixed"
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
    assert done(tuned).val_losses[0] == pytest.approx(done(tune(small, epochs=1)).val_losses[0], rel=0.02)
    assert not same_state(tuned, tune(small, epochs=1))


def test_it_repeats_bit_for_bit_and_follows_the_seed(small: nn.Module) -> None:
    data = loaders()
    states = torch.get_rng_state(), data[0].generator.get_state()
    one, two = tune(small, *data, epochs=1), tune(small, *data, epochs=1)
    assert same_state(one, two)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], data[0].generator.get_state())
    assert not same_state(one, tune(small, *data, epochs=1, seed=1))
    assert not same_state(one, tune(small, *loaders(seed=6), epochs=1))


class InterruptedRunError(Exception):
    """Stands for the end of the process."""


def interrupted_at(epoch: int) -> Callable[[Any, Tensor], Tensor]:
    """A loss that breaks off in the middle of an epoch."""
    batches = iter(range(10**6))

    def loss(output: Any, targets: Tensor) -> Tensor:
        if len(targets) == 64 and next(batches) == (epoch - 1) * 9 + 4:
            raise InterruptedRunError
        return F.cross_entropy(output, targets)

    return loss


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.AdamW, lr=1e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("epoch", [2, 3])
def test_resumed_is_uninterrupted(small: nn.Module, tmp_path: Path, epoch: int, optimizer: Any) -> None:
    options = {"epochs": 3, "lr": 0.05, "metric": accuracy, "optimizer": optimizer, "checkpoint": tmp_path / "tuning"}
    with pytest.raises(CalibrationError, match=rf"fails on epoch {epoch}, batch 4 of train_loader \(InterruptedRun"):
        tune(small, loss=interrupted_at(epoch), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["tuning"]
    torch.rand(7)
    resumed = tune(small, **options)
    whole = tune(small, **options | {"checkpoint": None})
    assert same_state(resumed, whole)
    assert done(resumed) == done(whole)
    assert done(whole).ran == 3


def test_a_checkpoint_that_was_cut_short_while_it_was_written_does_no_harm(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / ".tuning.01234_ab.part").mkdir()
    (tmp_path / ".tuning.01234_ab.part" / "tuning").write_bytes(b"half of it")
    first = tune(small, epochs=1, checkpoint=tmp_path / "tuning")
    assert same_state(first, tune(small, epochs=1))
    assert [path.name for path in tmp_path.iterdir()] == ["tuning"]


def test_checkpoints_of_other_runs(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "tuning"
    tuned = tune(small, epochs=1, checkpoint=path)
    with pytest.raises(FxpruneError, match=r"tuning was written with epochs=1, and now it is 2: go on with the same"):
        tune(small, epochs=2, checkpoint=path)
    with pytest.raises(FxpruneError, match=r"written with model=\d+, and now it is \d+"):
        tune(tuned, epochs=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FxpruneError, match=r"tuning is not a checkpoint that finetune wrote .*: remove it"):
        tune(small, epochs=1, checkpoint=path)
    torch.save({"fxprune_finetune": 9, "settings": {}, "state": {}}, path)
    with pytest.raises(FxpruneError, match=r"has checkpoint format 9, this fxprune reads 1"):
        tune(small, epochs=1, checkpoint=path)
    with pytest.raises(FxpruneError, match=r"there is no folder .*nowhere: make it first"):
        tune(small, epochs=1, checkpoint=tmp_path / "nowhere" / "tuning")


def test_the_best_epoch_is_kept_even_if_it_is_none(small: nn.Module) -> None:
    """Labels that are all wrong: every epoch makes it worse, and patience ends it."""
    train, val = loaders()
    wrong = [(x, (y + 1) % 10) for x, y in train]
    tuned = tune(small, wrong, val, epochs=9, lr=0.05, patience=2)
    assert (done(tuned).best, done(tuned).ran, done(tuned).epochs) == (0, 2, 9)
    assert same_state(tuned, small)


def test_the_metric_decides_where_there_is_one(small: nn.Module) -> None:
    """The metric likes what the validation loss does not."""
    tuned = tune(small, epochs=2, lr=0.05, metric=lambda output, target: -F.cross_entropy(output, target))
    worse = tune(small, epochs=2, lr=0.05, metric=F.cross_entropy)
    assert done(tuned).best == 2
    assert done(worse).best == 0
    assert done(tuned).val_losses == done(worse).val_losses == pytest.approx([-m for m in done(tuned).metrics])


def test_the_learning_rate_falls_along_a_cosine(small: nn.Module) -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    tune(small, epochs=2, optimizer=partial(Watched, lr=0.1))
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 20)) for step in range(20)])


# -- distillation ------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_paper() -> None:
    student, teacher = torch.randn(6, 4), nn.Linear(3, 4).requires_grad_(False)
    x = torch.randn(6, 3)
    found = Distillation(teacher, 0.5, 3.0, classes_last).divergence(student, x, None, "batch 0")
    p, q = (F.softmax(z / 3, 1) for z in (teacher(x), student))
    assert float(found) == pytest.approx(float(9 * (p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("shape", "moved"), [((2, 5), (2, 5)), ((2, 7, 5), (2, 7, 5)), ((2, 5, 8, 9), (2, 8, 9, 5))], ids=str
)
def test_where_the_classes_are(shape: tuple[int, ...], moved: tuple[int, ...]) -> None:
    assert classes_last(torch.zeros(shape)).shape == moved
    assert classes_last({"logits": torch.zeros(shape)}).shape == moved


def test_a_teacher_without_labels(trained: nn.Module, small: nn.Module) -> None:
    """Inputs alone: the smaller model comes to agree with the original."""
    before = picture(trained)
    unlabelled = [PIXELS[:600][start : start + 64] for start in range(0, 600, 64)]
    tuned = tune(small, unlabelled, [PIXELS[1200:]], epochs=3, lr=0.05, teacher=trained, distill=1.0)
    assert same_picture(before, picture(trained))
    assert done(tuned).val_losses[done(tuned).best] < 0.5 * done(tuned).val_losses[0]
    wanted = outputs(trained, PIXELS[1200:])[0].argmax(1)
    agreed = [float(accuracy(outputs(model, PIXELS[1200:])[0], wanted)) for model in (small, tuned)]
    assert agreed[1] > agreed[0]


def test_the_teacher_makes_a_difference_to_training_only(trained: nn.Module, small: nn.Module) -> None:
    alone, taught = tune(small, epochs=1), tune(small, epochs=1, teacher=trained.train(), distill=0.3)
    assert not same_state(alone, taught)
    assert done(alone).val_losses[0] == done(taught).val_losses[0]
    assert trained.eval().training is False


def test_a_teacher_of_other_classes(small: nn.Module) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(
        FxpruneError, match=r"the logits have shape \(64, 10\), the teacher's \(64, 3\): give a teacher"
    ):
        tune(small, epochs=1, teacher=other)


def test_outputs_without_logits() -> None:
    model = ZOO["several_outputs"].build()
    batches = [(ZOO["several_outputs"].example(8), torch.arange(8) % 5)]
    small = fxprune.compress(model, batches, 0.4, loss=squares, progress=False)
    with pytest.raises(FxpruneError, match=r"the model gives a \w+, which is no tensor of logits .*: pass logits="):
        tune(small, batches, batches, epochs=1, loss=squares, teacher=model)
    tuned = tune(
        small, batches, batches, epochs=1, loss=squares, teacher=model,
        logits=lambda output: torch.utils._pytree.tree_leaves(output)[0],
    )  # fmt: skip
    assert done(tuned).ran == 1


# -- as the last stage of compress -------------------------------------------------------------------------------------


def test_compress_ends_with_it(trained: nn.Module) -> None:
    data = [(PIXELS[:200], LABELS[:200])]
    train, val = loaders()
    options = {"train_loader": train, "val_loader": val, "epochs": 2, "lr": 0.05}
    tuned = fxprune.compress(trained, data, 0.6, progress=False, finetune=options, seed=3)
    small = fxprune.compress(trained, data, 0.6, progress=False, seed=3)
    assert same_state(tuned, tune(small, train, val, epochs=2, lr=0.05, seed=3))
    assert fxprune.report(tuned).error == fxprune.report(small).error is not None


def test_compress_checks_the_options_before_it_starts(trained: nn.Module) -> None:
    def never(output: Any, targets: Any) -> Tensor:
        raise AssertionError("scoring has begun")

    for options, message in (
        ({"epochs": 1}, r"the options of finetune do not fit \(missing a required argument: 'train_loader'\)"),
        (
            {"train_loader": [], "val_loader": [], "epoch": 1},
            r"do not fit \(finetune\(\) got an unexpected keyword argument 'epoch'; close names: 'epochs'",
        ),
        ({"train_loader": [], "val_loader": [], "epochs": 0}, "epochs is 0; it is a whole number, at least 1"),
    ):
        with pytest.raises(FxpruneError, match=message):
            fxprune.compress(trained, [(PIXELS[:9], LABELS[:9])], loss=never, progress=False, finetune=options)


def test_a_detector_is_trained_by_its_own_loss() -> None:
    model = detector()
    options = {"train_loader": DETECTED, "val_loader": DETECTED, "epochs": 3, "lr": 0.02}
    small = fxprune.compress(model, DETECTED, 0.3, **OPTIONS)
    before = picture(small)
    tuned: Any = fxprune.compress(model, DETECTED, 0.3, **OPTIONS, finetune=options)
    assert type(tuned) is type(model)
    assert done(tuned.backbone) == done(tuned)
    assert done(tuned).best > 0
    assert same_state(tuned, tune(small, *(DETECTED, DETECTED), epochs=3, lr=0.02, run=run))
    assert same_picture(before, picture(small))
    assert not torch.equal(tuned.head.weight, small.get_parameter("head.weight"))


# -- what is said where it cannot be done ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it is a whole number, at least 1"),
        ({"patience": 0}, "patience is 0; it is a whole number, at least 1"),
        ({"lr": -1.0}, "lr is -1.0; the learning rate is a positive number"),
        ({"distill": 1.5}, "distill is 1.5; it is the teacher's share"),
        ({"temperature": 0}, "temperature is 0; it divides logits"),
        ({"precision": "fp8"}, "precision is 'fp8'; it is one of 32-true, bf16-mixed, 16-mixed"),
        ({"optimizer": lambda p: 3}, r"optimizer= gave an int: it is called with a list of parameters"),
        ({"run": run, "metric": accuracy}, "run= gives a loss and no output, and metric= and teacher= need one"),
        (
            {"loss": lambda o, t: o.sum(1)},
            r"the loss of the model before its first epoch, batch 0 of val_loader has shape",
        ),
        ({"loss": lambda o, t: 1.0}, "batch 0 of val_loader has type float: it must be one number"),
        ({"metric": lambda o, t: float("nan")}, "the metric of the model before its first epoch, batch 0 .* is nan"),
        (
            {"loss": lambda o, t: o.detach().sum()},
            "the loss of epoch 1, batch 0 of train_loader does not depend on a par",
        ),
        ({"loss": F.mse_loss}, r"the loss mse_loss fails on the model before its first epoch, batch 0.*: pass loss="),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_options_without_a_meaning(small: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxpruneError, match=message):
        tune(small, **{"epochs": 1} | options)


def test_loaders_that_cannot_be_used(small: nn.Module) -> None:
    train, val = loaders()
    with pytest.raises(CalibrationError, match="val_loader gives no batch: at least one is needed"):
        tune(small, train, [], epochs=1)
    with pytest.raises(CalibrationError, match="train_loader gives no batch"):
        tune(small, [], val, epochs=1)
    with pytest.raises(CalibrationError, match="train_loader is a generator, which can be read only once"):
        tune(small, (batch for batch in train), val, epochs=1)
    with pytest.raises(CalibrationError, match=r"the model fails on epoch 1, batch 0 of train_loader \(\w+"):
        tune(small, [(PIXELS[:4, :, :2], LABELS[:4])], val, epochs=1)
    with pytest.raises(CalibrationError, match=r"batch 0 of val_loader has no samples, its first tensor is \(0, 1"):
        tune(small, train, [(PIXELS[:0], LABELS[:0])], epochs=1, loss=lambda o, t: o.sum())


def test_a_model_that_was_not_pruned(trained: nn.Module) -> None:
    with pytest.raises(FxpruneError, match=r"Digits has no report: it did not come from fxprune\.compress"):
        tune(trained, epochs=1)


def test_the_extra_is_named_where_it_is_missing(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(
        FxpruneError, match=re.escape(f"needs Lightning Fabric, the extra finetune: {install('finetune')}")
    ):
        tune(small, epochs=1)
    assert fxprune.compress(ZOO["residual"].build(), BATCHES, 0.3, progress=False)(images()(2)).shape == (2, 5)


def test_a_loss_that_becomes_infinite(small: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"the loss of epoch \d, batch \d+ of \w+ is (nan|inf): .* lower lr="):
        tune(small, epochs=3, lr=1e30)


def test_nothing_to_train(small: nn.Module) -> None:
    with pytest.raises(FxpruneError, match="no parameter of Digits requires a gradient: there is nothing to train"):
        tune(copy.deepcopy(small).requires_grad_(False), epochs=1)
