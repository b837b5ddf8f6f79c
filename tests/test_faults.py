"""Whatever goes wrong at whatever stage: the error says where, and model, process and folder are as they were."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import part_of, picture, same_picture, same_state
from torch import Tensor, nn
from zoo import ZOO, images

import fxprune
from fxprune.errors import CalibrationError, CaptureError, FxpruneError

SIZES = (20, 7, 5)
BATCHES = [(images()(size), torch.arange(size) % 5) for size in SIZES]
PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
MEMORY = "give smaller batches or another device="

FAULTS: dict[str, tuple[type[BaseException], str]] = {
    "interrupt": (KeyboardInterrupt, ""),
    "error": (OSError, "gone"),
    "memory of a device": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    "memory of torch": (RuntimeError, "[alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "memory of Python": (MemoryError, ""),
}


@dataclass(frozen=True)
class Row:
    """A part of the caller's that fails in a stage, from some call of it on while a function of the package runs.

    `says` is what the error says of it, after the stage.
    """

    stage: str
    part: str
    inside: str
    says: str
    call: int = 1

    @property
    def captures(self) -> bool:
        """Whether it is the model that fails to be captured, of which the error is of a kind of its own."""
        return self.stage == "capturing" and self.part in ("layer", "forward")


ROWS = (
    Row("capturing", "loader", "with_captured_part", "the loader fails on batch 0"),
    Row("capturing", "unpack", "with_captured_part", "unpack= fails on batch 0 of the loader"),
    Row("capturing", "layer", "with_captured_part", "Residual does not run on the example"),
    Row("capturing", "forward", "with_captured_part", "Residual does not run on the example"),
    Row("scoring", "loader", "_read", "the loader fails on batch 1", call=2),
    Row("scoring", "unpack", "_read", "unpack= fails on batch 2 of the loader", call=3),
    Row("scoring", "layer", "_read", "the model fails on batch 1", call=10),
    Row("scoring", "loss", "_read", "the loss failing fails on batch 1", call=2),
    Row("scoring", "backward", "_read", "the backward pass fails on batch 1", call=2),
    Row("verifying", "layer", "error_of", "the original fails on the example"),
    Row("verifying", "layer", "error_of", "the rewritten model fails on the example", call=7),
    Row("compensating", "loader", "calibration_of", "the loader fails on batch 1", call=2),
    Row("compensating", "unpack", "calibration_of", "unpack= fails on batch 1 of the loader", call=2),
    Row("compensating", "layer", "refit", "stem of the model fails on batch 1", call=5),
    Row("compensating", "layer", "_outputs", "the model fails on the samples held out, batch 0 of them"),
    Row("re-estimating the BatchNorms", "layer", "re_estimate", "stem of the model fails on batch 2", call=3),
    Row("fine-tuning", "loader", "_train", "train_loader fails on epoch 1, batch 1", call=2),
    Row("fine-tuning", "unpack", "_train", "unpack= fails on epoch 1, batch 1 of train_loader", call=2),
    Row("fine-tuning", "layer", "_train", "the model fails on epoch 1, batch 1 of train_loader", call=7),
    Row("fine-tuning", "loss", "_train", "the loss failing fails on epoch 1, batch 1 of train_loader", call=2),
    Row("fine-tuning", "backward", "_train", "the training step fails on epoch 1, batch 1", call=2),
    Row("fine-tuning", "loader", "_judge", "val_loader fails on the model before its first epoch, batch 0"),
    Row("fine-tuning", "metric", "_judge", "metric= fails on epoch 1, batch 0 of val_loader", call=4),
)  # fmt: skip


@dataclass
class Trip:
    """Raises from some call on, while a function is being run."""

    row: Row
    fault: tuple[type[BaseException], str]
    calls: int = 0

    def __call__(self) -> None:
        if any(frame.f_code.co_name == self.row.inside for frame in frames()):
            self.calls += 1
            if self.calls >= self.row.call:
                kind, text = self.fault
                raise kind(text)


def frames() -> Iterator[Any]:
    """The frames of the package that are being run, and none of others that may have functions of the same names."""
    frame = sys._getframe(1)
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(Path(fxprune.__file__).parent):
            yield frame
        frame = frame.f_back  # type: ignore[assignment]


class Loader:
    def __init__(self, trip: Callable[[], None]) -> None:
        self.trip = trip

    def __iter__(self) -> Iterator[Any]:
        for batch in BATCHES:
            self.trip()
            yield batch

    def __len__(self) -> int:
        return len(BATCHES)


def nothing() -> None:
    """What is called where nothing fails."""


def options(row: Row, trip: Trip, monkeypatch: pytest.MonkeyPatch) -> tuple[Loader, dict[str, Any], dict[str, Any]]:
    """A loader, and options for `compress` and for `finetune`, with a trip where the row says."""

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            trip()
            return function(*args, **kwargs)

        return failing

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(Backward.apply(output, trip) if row.part == "backward" else output, target)  # type: ignore[no-untyped-call]

    patched: dict[str, tuple[Any, str]] = {
        "layer": (nn.Conv2d, "_conv_forward"),
        "forward": (type(ZOO["residual"].build()), "forward"),
    }
    if row.part in patched:
        owner, name = patched[row.part]
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    shared: dict[str, Any] = {"loss": before(loss) if row.part == "loss" else loss, "progress": False}
    if row.part == "unpack":
        shared["unpack"] = before(lambda batch: batch)
    metric = before(lambda output, _: output.mean())
    return Loader(trip if row.part == "loader" else nothing), shared, {"metric": metric} if row.part == "metric" else {}


class Backward(torch.autograd.Function):
    """Hands on what it gets, and trips on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.trip()
        return grads[0], None


def model() -> nn.Module:
    return ZOO["residual"].build().train()


def replaced() -> list[object]:
    """What tracing replaces in torch and in Python for a while."""
    return [builtins.len, torch.zeros, torch.arange, nn.Module.__call__, nn.Module.__getattr__, nn.Conv2d.forward]


@pytest.fixture(scope="module")
def expected() -> nn.Module:
    return fxprune.compress(model(), BATCHES, 0.3, progress=False)


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A model in an empty folder, both of which have to be as they were, in a process that has to be so too."""
    given, world = model(), replaced()
    before = picture(given)
    monkeypatch.chdir(tmp_path)
    yield given
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert same_picture(before, picture(given))
    assert world == replaced()


@pytest.mark.parametrize("fault", ["interrupt", "error", "memory of a device"])
@pytest.mark.parametrize("row", part_of(ROWS, 8, [f"{row.stage}-{row.part}-{row.inside}-{row.call}" for row in ROWS]))
def test_a_fault(row: Row, fault: str, untouched: nn.Module, expected: nn.Module, monkeypatch: Any) -> None:
    kind, text = FAULTS[fault]
    loader, shared, more = options(row, Trip(row, (kind, text)), monkeypatch)
    before = picture(expected)

    def run() -> None:
        if row.stage == "fine-tuning":
            pytest.importorskip("lightning_fabric")
            fxprune.finetune(expected, loader, loader, epochs=2, **shared, **more)
        else:
            fxprune.compress(untouched, loader, 0.3, **shared)

    with pytest.raises((KeyboardInterrupt, FxpruneError)) as caught:
        run()
    assert same_picture(before, picture(expected))
    if fault == "interrupt":
        assert caught.type is KeyboardInterrupt
        monkeypatch.undo()
        assert same_state(fxprune.compress(untouched, BATCHES, 0.3, progress=False), expected)
        return
    said = str(caught.value)
    assert row.says in said
    assert kind.__name__ in said
    assert text in said
    assert (MEMORY in said) == fault.startswith("memory")
    assert row.captures or said.startswith(f"while {row.stage}: {row.says}")
    assert caught.type is (CaptureError if row.captures else CalibrationError)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "error"])
@pytest.mark.parametrize(
    ("owner", "name", "doing"),
    [
        ("fxprune.scoring.score", "ranked", "scoring"),
        ("torch.linalg", "cholesky_ex", "compensating"),
        ("fxprune.recovery.candidates", "rewrite", "rewriting"),
        ("copy", "deepcopy", "capturing"),
        ("copy", "deepcopy", "fine-tuning"),
    ],
)
def test_what_fails_between_batches(
    owner: str, name: str, doing: str, fault: str, untouched: nn.Module, expected: nn.Module, monkeypatch: Any
) -> None:
    kind, text = FAULTS[fault]

    def full(*args: Any, **kwargs: Any) -> Any:
        raise kind(text)

    monkeypatch.setattr(importlib.import_module(owner), name, full)
    before = picture(expected)

    def run() -> None:
        if doing == "fine-tuning":
            pytest.importorskip("lightning_fabric")
            fxprune.finetune(expected, BATCHES, BATCHES, epochs=1, progress=False)
        fxprune.compress(untouched, BATCHES, 0.3, progress=False)

    with pytest.raises((KeyboardInterrupt, CalibrationError)) as caught:
        run()
    assert same_picture(before, picture(expected))
    assert str(caught.value).startswith(f"while {doing}: ") == (fault != "interrupt")
    assert (MEMORY in str(caught.value)) == (fault != "interrupt")


# -- data that are not what they should be -----------------------------------------------------------------------------


def spoiled(value: float, sample: int = 21) -> list[tuple[Tensor, Tensor]]:
    """The batches with one number of the second replaced; its sample is one to fit to, or one that is held out."""
    x = torch.cat([images for images, _ in BATCHES])
    x[sample, 1, 3, 3] = value
    return [(part, labels) for part, (_, labels) in zip(x.split(SIZES), BATCHES, strict=True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_in_a_batch_that_is_not_finite(value: float, untouched: nn.Module, expected: nn.Module) -> None:
    bad, scores = spoiled(value), fxprune.score(untouched, BATCHES, progress=False)
    plan = scores.plan(0.3)
    text = "holds NaN or infinity"
    with pytest.raises(CalibrationError, match=rf"while scoring: the loss of batch 1 is nan: the input x {text}"):
        fxprune.compress(untouched, bad, 0.3, progress=False)
    for level, sample in (("sequential", 21), ("sequential", 24), ("ridge", 21)):
        with pytest.raises(CalibrationError, match=rf"while compensating: the input x {text} on batch 1 of the loader"):
            fxprune.apply(untouched, plan, scores=scores, loader=spoiled(value, sample), compensate=level)  # type: ignore[arg-type]
    small = fxprune.apply(untouched, plan)
    with pytest.raises(CalibrationError, match=rf"while verifying: the input x {text} on the example"):
        fxprune.verify(untouched, plan, small, bad[1][0])
    before = picture(expected)
    pytest.importorskip("lightning_fabric")
    for loaders, where in (((bad, BATCHES), "epoch 1, batch 1 of train"), ((BATCHES, bad), "epoch, batch 1 of val")):
        with pytest.raises(CalibrationError, match=f"while fine-tuning: the loss of .*{where}_loader is nan: look at"):
            fxprune.finetune(expected, *loaders, epochs=1, progress=False)
    assert same_picture(before, picture(expected))


@pytest.mark.parametrize("reduction", ["none", "number"])
def test_a_loss_that_is_not_a_scalar(reduction: str, untouched: nn.Module, expected: nn.Module) -> None:
    def loss(output: Tensor, target: Tensor) -> Any:
        value = F.cross_entropy(output, target, reduction="none")
        return value if reduction == "none" else float(value.mean().detach())

    what = r"shape \(20,\)" if reduction == "none" else "type float"
    with pytest.raises(
        CalibrationError, match=rf"while scoring: the loss of batch 0 has {what}: it must be one number"
    ):
        fxprune.compress(untouched, BATCHES, 0.3, loss=loss, progress=False)
    before = picture(expected)
    pytest.importorskip("lightning_fabric")
    with pytest.raises(CalibrationError, match=rf"while fine-tuning: the loss of .*, batch 0 of .*_loader has {what}"):
        fxprune.finetune(expected, BATCHES, BATCHES, epochs=1, loss=loss, progress=False)
    assert same_picture(before, picture(expected))


class Subclass(Tensor):
    """A tensor that no deep copy is made of."""


class Unsized(list[Any]):
    """A list of a length that no list has."""

    size: Any = -1

    def __len__(self) -> int:
        return self.size  # type: ignore[no-any-return]


def one_batch(change: Callable[[Tensor], Any], **options: Any) -> nn.Module:
    """What pruning gives on one batch whose images were changed."""
    return fxprune.compress(model(), [(change(BATCHES[0][0]), BATCHES[0][1])], 0.3, progress=False, **options)


@pytest.mark.wide
def test_odd_lengths_of_a_loader_count_as_none_and_classes_of_tensors_as_tensors(expected: nn.Module) -> None:
    for size in (-1, 10**30, "a"):
        loader = Unsized(BATCHES)
        loader.size = size
        assert same_state(fxprune.compress(model(), loader, 0.3, progress=False), expected)
    assert same_state(one_batch(lambda x: x.as_subclass(Subclass)), one_batch(lambda x: x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x, {"unpack": lambda batch: batch[0]}, "unpack= gives a Tensor on batch 0 of the loader: it has to"),
        (lambda x: x, {"unpack": lambda _: (1, 2, 3)}, "unpack= gives a tuple of length 3 on batch 0 of the loader"),
        (lambda x: x, {"unpack": lambda _: None}, "unpack= gives None on batch 0 of the loader"),
        (lambda x: x.to("meta"), {}, r"batch 0 of the loader holds a tensor of shape \(20, 3.* without numbers"),
        (
            lambda x: x.to_mkldnn(),
            {},
            "batch 0 of the loader holds a tensor of the layout torch._mkldnn: make it dense",
        ),
        (lambda x: torch.nested.nested_tensor(list(x)), {}, "batch 0 of the loader holds a nested tensor: pad it"),
        (lambda x: x, {"loss": lambda *_: torch.ones((), device="meta")}, "the loss of batch 0 holds a .*out numbers"),
        (lambda x: x, {"loss": lambda *_: torch.ones(1).to_sparse()}, "the loss of batch 0 holds a .*: make it dense"),
        (lambda x: x, {"loss": lambda *_: torch.ones(1) * 1j}, "the loss of batch 0 has dtype complex64: it must be"),
        (lambda x: x, {"classes": lambda y: y.to_sparse(), "propose": "separability"}, "what classes= gives holds a t"),
    ],
)
def test_batches_and_losses_that_nothing_is_computed_with(
    change: Callable[[Tensor], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        one_batch(change, **options)


@pytest.mark.parametrize("name", ["loss", "unpack", "run"])
def test_an_error_without_a_text_is_told_by_its_type(name: str) -> None:
    class WordlessError(Exception):
        def __str__(self) -> str:
            return 3  # type: ignore[return-value]  # noqa: PLE0307

    def failing(*_: Any) -> Any:
        raise WordlessError

    with pytest.raises(FxpruneError, match=r"fails on .*\(WordlessError\)"):
        one_batch(lambda x: x, **{name: failing})


def test_the_page_names_tests_that_there_are_and_every_stage() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if ".py::" in line]
    for *_, place, _ in rows:
        file, name = place.strip(" `").split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()
    told = {
        (stage.strip(), place.strip(" `").split("::")[1])
        for row in rows
        for stage in row[2].split(",")
        for place in row[4:5]
    }
    assert {(row.stage, "test_a_fault") for row in ROWS} <= told
    assert len(rows) > 10
