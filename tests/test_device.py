"""Models on an accelerator: results stay there, and agree with those of the CPU.

It is a CUDA device, or else the one that `pytest -p simulated` makes; test_simulated_device.py starts that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import BATCHES, OPTIONS, detector
from helpers import difference, outputs
from nets import layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from zoo import ZOO, images

import fxprune
from fxprune.errors import CaptureError, FxpruneError

DEVICE = "cuda" if torch.cuda.is_available() else "simulated" if hasattr(torch, "simulated") else ""
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")

CPU_BATCHES = [(images()(20), torch.arange(20) % 5), (images()(6), torch.arange(6) % 5)]
DEVICE_BATCHES = [(x.to(DEVICE), y.to(DEVICE)) for x, y in CPU_BATCHES] if DEVICE else []

# their forwards make tensors on the CPU, whatever they are given
ON_THE_CPU, STATE_ON_THE_CPU = {"buffers", "constants_of_channels"}, "lstm_from_zeros"


def moved(example: Any, device: str) -> Any:
    """An example in double precision on a device; lengths of sequences stay on the CPU, where torch wants them."""

    def move(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t.double().to(device)
        return t if t.ndim == 1 else t.to(device)

    return pytree.tree_map_only(Tensor, move, example)


class AsOnDevice(TorchFunctionMode):
    """What the CPU computes, computed as on CUDA, where torch takes a sixth rounded to float32, whatever the dtype."""

    SIXTH = float(torch.tensor(1.0) / 6)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if DEVICE != "cuda" or function not in (F.hardsigmoid, F.hardswish):
            return function(*args, **options)
        x, in_place = args[0], True in (*args[1:], *options.values())
        gate = (x + 3).clamp(0, 6) * self.SIXTH
        found = gate if function is F.hardsigmoid else x * gate
        return x.copy_(found) if in_place else found


@pytest.mark.parametrize("name", [name for name in list(ZOO)[::4] if name not in {*ON_THE_CPU, STATE_ON_THE_CPU}])
def test_the_zoo_verifies_on_the_device(name: str) -> None:
    case = ZOO[name]
    model, here, there = case.build().double().to(DEVICE), moved(case.example(2), "cpu"), moved(case.example(2), DEVICE)
    plan = fxprune.Scores.random(model, there).plan(alpha=0.6)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, there) < 1e-9
    made = dict(fxprune.capture(model, there).named_buffers()).keys() - dict(model.named_buffers()).keys()
    found = {t.device.type for n, t in (*small.named_parameters(), *small.named_buffers()) if n not in made}
    assert found == {DEVICE}  # numbers that a forward makes stay where it makes them
    on_device = [tensor.cpu() for tensor in outputs(small, there)]
    small.cpu()
    with AsOnDevice():
        assert difference(on_device, outputs(small, here)) < 1e-9


@pytest.mark.parametrize("name", sorted(ON_THE_CPU))
def test_a_model_that_does_not_run_on_the_device_says_so(name: str) -> None:
    model = ZOO[name].build().double().to(DEVICE)
    with pytest.raises(CaptureError, match=r"does not run on the example .*same device"):
        fxprune.capture(model, moved(ZOO[name].example(2), DEVICE))


def test_a_model_whose_shapes_alone_can_be_computed_there_says_so_too() -> None:
    model, batch = ZOO[STATE_ON_THE_CPU].build().double().to(DEVICE), moved(ZOO[STATE_ON_THE_CPU].example(2), DEVICE)
    with pytest.raises(CaptureError, match=r"does not run on the example .*same device"):
        fxprune.score(model, [(batch, torch.arange(2))], progress=False)


@pytest.mark.parametrize("batches", [CPU_BATCHES, DEVICE_BATCHES])
def test_a_model_on_the_device_is_compressed_there(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = ZOO["residual"].build().to(DEVICE)
    small = fxprune.compress(model, batches, 0.4, progress=False)
    assert {parameter.device.type for parameter in small.parameters()} == {DEVICE}
    assert small(images()(2).to(DEVICE)).shape == (2, 5)


def test_scores_agree_with_those_of_the_cpu() -> None:
    model = ZOO["residual"].build().double()
    batches = [(x.double(), y) for x, y in CPU_BATCHES]
    here = fxprune.score(model, batches, progress=False)
    there = fxprune.score(model, batches, device=DEVICE, progress=False)
    assert np.allclose(here.propose, there.propose, rtol=1e-4)
    assert np.allclose(here.protect, there.protect, rtol=1e-6)


def test_float32_is_multiplied_in_full_there() -> None:
    """Products rounded to TF32, a GPU's default for convolutions, would be a thousand times as far from the CPU's."""
    model = ZOO["residual"].build()
    here, there = (fxprune.score(model, CPU_BATCHES, device=device, progress=False) for device in ("cpu", DEVICE))
    assert np.allclose(here.propose, there.propose, rtol=0, atol=1e-5 * here.propose.max())
    assert np.allclose(here.protect, there.protect, rtol=0, atol=1e-5 * here.protect.max())
    plan = there.plan(alpha=0.4)
    assert plan.keep == here.plan(alpha=0.4).keep
    small = fxprune.apply(model.to(DEVICE), plan)
    assert fxprune.verify(model, plan, small, images()(6)) < 1e-5


def test_lengths_of_sequences_may_be_anywhere() -> None:
    case = ZOO["packed_lstm_states_samples_first"]
    model, batches = case.build().double(), [(moved(case.example(12), "cpu"), torch.arange(12) % 5)]
    here, there = (fxprune.score(model, batches, device=device, progress=False) for device in ("cpu", DEVICE))
    assert np.allclose(here.propose, there.propose, rtol=1e-6)
    plan = here.plan(alpha=0.4)
    assert plan.keep == there.plan(alpha=0.4).keep
    small = fxprune.apply(model.to(DEVICE), plan, loader=batches, compensate="sequential")
    x, lengths = moved(case.example(3), DEVICE)
    assert difference(outputs(small, (x, lengths)), outputs(small, (x, lengths.to(DEVICE)))) == 0


@layers(lambda: dict(
    body=nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 8)), rnn=nn.GRU(8, 5, batch_first=True),
))  # fmt: skip
def Packing(self, x: Tensor, lengths: Tensor) -> Tensor:
    """A part that is pruned, in a forward of the user's that packs what it gives."""
    packed = pack_padded_sequence(self.body(x), lengths, batch_first=True, enforce_sorted=False)
    return self.rnn(packed)[1][-1]


def test_a_forward_that_wants_lengths_on_the_cpu_gets_them_there() -> None:
    batches = [(ZOO["packed_there"].example(12), torch.arange(12) % 5)]
    options = {"submodule": "body", "device": DEVICE, "progress": False}
    with pytest.raises(FxpruneError, match=r"'lengths' argument should be a 1D CPU .*with unpack="):
        fxprune.score(Packing(), batches, **options)

    def unpack(batch: Any) -> Any:
        (x, lengths), targets = batch
        return (x.to(DEVICE), lengths), targets

    assert fxprune.score(Packing(), batches, unpack=unpack, **options).propose.any()


@pytest.mark.parametrize("level", ["none", "bias", "ridge", "sequential"])
@pytest.mark.parametrize("name", ["residual", "grouped_chain", "attention_chunk_function", "lstm_deep_both_ways"])
def test_compensation_agrees_with_that_of_the_cpu(name: str, level: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model, example = case.build().double(), moved(case.example(12), "cpu")
    batches = [(example, torch.arange(12) % 5)]
    scores = fxprune.score(model, batches, progress=False)
    plan, options = scores.plan(alpha=0.5), {"scores": scores, "loader": batches, "compensate": level}
    here = fxprune.apply(model, plan, **options)
    there = fxprune.apply(model.to(DEVICE), plan, **options)
    found = outputs(there, moved(example, DEVICE))
    assert difference(outputs(here, example), [tensor.cpu() for tensor in found]) < 1e-9
    fxprune.save(there, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", model)
    assert difference(found, outputs(loaded, moved(example, DEVICE))) == 0
    assert {tensor.device.type for tensor in loaded.parameters()} == {DEVICE}


@pytest.mark.parametrize("home", ["cpu", DEVICE])
def test_a_part_is_scored_on_the_device(home: str) -> None:
    model = detector().to(home)
    small = fxprune.compress(model, BATCHES, 0.3, device=DEVICE, **OPTIONS)
    tensors = (*small.parameters(), *small.buffers(), *model.parameters(), *model.buffers())
    assert {tensor.device.type for tensor in tensors} == {home}
    assert fxprune.report(small).params_after < fxprune.report(small).params_before


def test_positions_have_classes_on_the_device() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).double()
    masks = torch.randint(0, 4, (20, 8, 8), generator=torch.Generator().manual_seed(0))
    batches = [(images()(20).double(), masks)]
    options = {"classes": fxprune.classes.each_position(), "progress": False}
    here, there = (fxprune.score(model, batches, device=device, **options) for device in ("cpu", DEVICE))
    assert np.allclose(here.propose, there.propose, rtol=1e-6)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: lightning knows no simulated one")
@pytest.mark.parametrize("precision", [None, "16-mixed", "32-true"])
@pytest.mark.parametrize("home", ["cpu", DEVICE])
def test_fine_tuning_on_the_device(home: str, precision: str | None) -> None:
    model = ZOO["residual"].build().to(home)
    small = fxprune.compress(model, CPU_BATCHES, 0.4, progress=False)
    options = {"epochs": 3, "device": DEVICE, "precision": precision, "progress": False, "teacher": model}
    tuned = fxprune.finetune(small, CPU_BATCHES, CPU_BATCHES, **options)
    done = fxprune.report(tuned).finetuned
    assert done is not None
    assert done.precision == (precision or ("bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"))
    assert done.val_losses[done.best] < done.val_losses[0]
    assert {t.device.type for t in (*tuned.parameters(), *tuned.buffers(), *model.parameters())} == {home}
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
