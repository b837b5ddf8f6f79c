"""Models on an accelerator: results stay there, and scores agree with those of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectors import BATCHES, OPTIONS, detector
from helpers import difference, outputs
from torch.utils import _pytree as pytree
from zoo import ZOO, images

import fxprune
from fxprune.errors import CaptureError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU_BATCHES = [(images()(20), torch.arange(20) % 5), (images()(6), torch.arange(6) % 5)]
GPU_BATCHES = [(x.cuda(), y.cuda()) for x, y in CPU_BATCHES] if torch.cuda.is_available() else []


ON_THE_CPU = {"buffers", "constants_of_channels"}  # their forwards make tensors there, whatever they are given


def moved(example: Any, device: str) -> Any:
    """An example in double precision on a device; lengths of sequences stay on the CPU, where torch wants them."""

    def move(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point():
            return t.double().to(device)
        return t if t.ndim == 1 else t.to(device)

    return pytree.tree_map_only(torch.Tensor, move, example)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ON_THE_CPU])
def test_the_zoo_verifies_on_the_device(name: str) -> None:
    case = ZOO[name]
    model, here, there = case.build().double().cuda(), moved(case.example(2), "cpu"), moved(case.example(2), "cuda")
    plan = fxprune.Scores.random(model, there).plan(alpha=0.6)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, there) < 1e-9
    made = dict(fxprune.capture(model, there).named_buffers()).keys() - dict(model.named_buffers()).keys()
    found = {t.device.type for n, t in (*small.named_parameters(), *small.named_buffers()) if n not in made}
    assert found == {"cuda"}  # numbers that a forward makes stay where it makes them
    on_device = [tensor.cpu() for tensor in outputs(small, there)]
    small.cpu()
    assert difference(on_device, outputs(small, here)) < 1e-9


@pytest.mark.parametrize("name", sorted(ON_THE_CPU))
def test_a_model_that_does_not_run_on_the_device_says_so(name: str) -> None:
    model = ZOO[name].build().double().cuda()
    with pytest.raises(CaptureError, match=r"does not run on the example .*same device"):
        fxprune.capture(model, moved(ZOO[name].example(2), "cuda"))


@pytest.mark.parametrize("batches", [CPU_BATCHES, GPU_BATCHES])
def test_a_model_on_the_device_is_compressed_there(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    model = ZOO["residual"].build().cuda()
    small = fxprune.compress(model, batches, 0.4, progress=False)
    assert {parameter.device.type for parameter in small.parameters()} == {"cuda"}
    assert small(images()(2).cuda()).shape == (2, 5)


def test_a_model_on_the_cpu_can_be_scored_on_the_device() -> None:
    model = ZOO["residual"].build()
    small = fxprune.compress(model, CPU_BATCHES, 0.4, device="cuda", progress=False)
    assert {parameter.device.type for parameter in (*small.parameters(), *model.parameters())} == {"cpu"}


def test_scores_agree_with_those_of_the_cpu() -> None:
    model = ZOO["residual"].build().double()
    batches = [(x.double(), y) for x, y in CPU_BATCHES]
    here = fxprune.score(model, batches, progress=False)
    there = fxprune.score(model, batches, device="cuda", progress=False)
    assert np.allclose(here.propose, there.propose, rtol=1e-4)
    assert np.allclose(here.protect, there.protect, rtol=1e-6)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_part_is_scored_on_the_device(home: str) -> None:
    model = detector().to(home)
    small = fxprune.compress(model, BATCHES, 0.3, device="cuda", **OPTIONS)
    tensors = (*small.parameters(), *small.buffers(), *model.parameters(), *model.buffers())
    assert {tensor.device.type for tensor in tensors} == {home}
    assert fxprune.report(small).params_after < fxprune.report(small).params_before


def test_positions_have_classes_on_the_device() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).double()
    masks = torch.randint(0, 4, (20, 8, 8), generator=torch.Generator().manual_seed(0))
    batches = [(images()(20).double(), masks)]
    options = {"classes": fxprune.classes.each_position(), "progress": False}
    here, there = (fxprune.score(model, batches, device=device, **options) for device in ("cpu", "cuda"))
    assert np.allclose(here.propose, there.propose, rtol=1e-6)


@pytest.mark.parametrize("precision", [None, "16-mixed", "32-true"])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_fine_tuning_on_the_device(home: str, precision: str | None) -> None:
    model = ZOO["residual"].build().to(home)
    small = fxprune.compress(model, CPU_BATCHES, 0.4, progress=False)
    options = {"epochs": 3, "device": "cuda", "precision": precision, "progress": False, "teacher": model}
    tuned = fxprune.finetune(small, CPU_BATCHES, CPU_BATCHES, **options)
    done = fxprune.report(tuned).finetuned
    assert done is not None
    assert done.precision == (precision or ("bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"))
    assert done.val_losses[done.best] < done.val_losses[0]
    assert {t.device.type for t in (*tuned.parameters(), *tuned.buffers(), *model.parameters())} == {home}
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
