"""What becomes of a smaller model: exported and read back, compiled, traced, quantised, with the same outputs."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, outputs, part_of, picture, same_picture
from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from zoo import ZOO, images, randomise

import fxprune
from fxprune.caller.installation import install
from fxprune.errors import ExportError

X = images(size=32)(2)
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "mobilenet": lambda: MobileNetV2(
        10, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    ),
    "vit": partial(
        VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    ),
}  # fmt: skip


@pytest.fixture(params=part_of(BUILDS, 3), scope="module")
def small(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(BUILDS[request.param]()).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)  # the head of a vision transformer begins with zeros
    smaller = fxprune.apply(model, fxprune.Scores.random(model, X).plan(alpha=0.5, allocate="tod-by-group"))
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    return smaller


def of_zoo(name: str) -> nn.Module:
    model = ZOO[name].build().eval()
    return fxprune.apply(
        model, fxprune.Scores.random(model, ZOO[name].example(2)).plan(alpha=0.5, allocate="tod-by-group")
    )


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def test_onnx(small: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    before = picture(small)
    error = fxprune.export(small, tmp_path / "model.onnx", X)
    assert same_picture(before, picture(small))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert 0 <= error < 1e-4
    for batch in (1, 2, 7):
        inputs = images(size=32)(batch)
        assert difference(outputs(small, inputs), run_onnx(tmp_path / "model.onnx", inputs)) < 1e-4


def test_torch_export(small: nn.Module, tmp_path: Path) -> None:
    assert fxprune.export(small, tmp_path / "model.pt2", X) < 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 7):
        inputs = images(size=32)(batch)
        with torch.no_grad():
            assert difference(outputs(small, inputs), [program(inputs)]) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_compile_with_inductor(small: nn.Module) -> None:
    compiled = torch.compile(small)
    assert difference(outputs(small, X), outputs(compiled, X)) < 1e-4
    torch._dynamo.reset()


def test_torchscript(small: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out
        traced = torch.jit.trace(small, X)
        traced.save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
    with torch.no_grad():
        assert difference(outputs(small, X), [loaded(X)]) < 1e-5


ONNX = pytest.param("onnx", marks=pytest.mark.skipif(not find_spec("onnxscript"), reason="needs onnxscript"))


@pytest.mark.parametrize("suffix", [ONNX, "pt2"])
@pytest.mark.parametrize("name", ["several_inputs", "dict_input", "keywords_and_defaults", "gated_units"])
def test_inputs_and_outputs_of_every_form(name: str, suffix: str, tmp_path: Path) -> None:
    model, example = of_zoo(name), ZOO[name].example(2)
    assert fxprune.export(model, tmp_path / f"model.{suffix}", example) < 1e-5


def test_an_output_that_is_no_tensor(tmp_path: Path) -> None:
    model, example = of_zoo("several_outputs"), ZOO["several_outputs"].example(2)
    assert fxprune.export(model, tmp_path / "model.pt2", example) < 1e-5
    pytest.importorskip("onnxscript")
    with pytest.raises(
        ExportError, match="SeveralOutputs gives 8, an int, among its outputs, and ONNX has only tensors"
    ):
        fxprune.export(model, tmp_path / "model.onnx", example)


class Fixed(nn.Module):
    """Its batch has two samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, -1).sum(2)


class Growing(nn.Module):
    """Gives other numbers at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Growing.calls += 1
        return x * Growing.calls


@pytest.mark.parametrize(
    ("name", "build", "example", "text"),
    [
        ("model.pt", Fixed, X, r"ends in '\.pt': name a file that ends in \.onnx or \.pt2"),
        ("model.pt2", Fixed, X, r"Fixed cannot be exported to .*: .*; dynamic_batch=False fixes the size of the batch"),
        (
            "model.pt2",
            Growing,
            X,
            r"differ from those of Growing by .* of their scale, more than 0.0001: the file was not",
        ),
        (
            "model.pt2",
            Growing,
            torch.tensor(1.0),
            r"has no tensor of at least one row: pass dynamic_batch=False",
        ),
        (
            "model.pt2",
            lambda: nn.Linear(3, 2),
            torch.zeros(2, 5),
            r"^Linear does not run on the example \(RuntimeError: mat1 and .*\): give one batch as its forward takes",
        ),
        ("none/model.pt2", Growing, X, "there is no folder .*none; make it first"),
    ],
)
def test_what_cannot_be_exported(name: str, build: Any, example: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=text):
        fxprune.export(build(), tmp_path / name, example)
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ExportError, match=re.escape(f"needs onnxscript, of the extra export: {install('export')}")):
        fxprune.export(Fixed(), tmp_path / "model.onnx", X)


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")

    def interrupted(program: Any, unfinished: Path) -> None:
        unfinished.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxprune.export(of_zoo("residual"), path, images()(2))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
