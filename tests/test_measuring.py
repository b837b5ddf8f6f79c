"""Measured latency: two models in turns, what goes into the report, and what is said where the small one is slow."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import picture, same_picture
from nets import layers
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer
from zoo import ZOO, images

import fxprune
from fxprune.errors import FxpruneError
from fxprune.reporting import measured_latency as measuring
from fxprune.reporting.timings import BatchLatency, MeasuredLatency, Timing
from fxprune.reporting.why_slow import node_costs, why_slow

QUICK: dict[str, Any] = {"repeats": 5, "seconds": 0.0}


def pruned(model: nn.Module, example: Any, alpha: float = 0.5, **options: Any) -> nn.Module:
    scores = fxprune.Scores.random(model, example)
    return fxprune.apply(model, scores.plan(alpha, allocate="uniform", **options))


def residual() -> tuple[nn.Module, nn.Module]:
    model = ZOO["residual"].build().eval()
    return model, pruned(model, images()(2))


def test_it_measures_both_at_every_batch_size_and_goes_into_the_report() -> None:
    model, small = residual()
    before = picture(model)
    found = fxprune.measure_latency(model, small, images()(3), (1, 5), threads=1, **QUICK)
    assert [pair.batch_size for pair in found.batches] == [1, 5]
    assert (found.device, found.threads) == ("cpu", 1)
    for pair in found.batches:
        for timing in (pair.before, pair.after):
            assert 0 < timing.low <= timing.median <= timing.high
            assert timing.runs >= timing.turns == 5
    assert fxprune.report(small).latency == found
    assert same_picture(before, picture(model))
    assert json.loads(json.dumps(fxprune.report(small).to_dict()))["latency"]["threads"] == 1


class Clocked:
    """Stands in for a timer: notes whose turn it is, and takes the time that it is told."""

    order: list[int] = []  # noqa: RUF012 - one list for all

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.timer = seconds, Timer("pass")

    def blocked_autorange(self, *, min_run_time: float) -> Measurement:
        Clocked.order.append(id(self))
        return Measurement(1, [next(self.seconds)], self.timer._task_spec)


def test_the_models_take_turns_and_the_quartiles_are_kept() -> None:
    Clocked.order.clear()
    timers: list[Any] = [Clocked(iter([1.0, 2, 3, 4, 5])), Clocked(iter([0.5] * 5))]
    one, two = measuring.in_turns(timers, 5, 0.0)
    assert (one.low, one.median, one.high, one.turns, one.runs) == (2, 3, 4, 5, 5)
    assert (two.low, two.median, two.high) == (0.5, 0.5, 0.5)
    first, second = map(id, timers)
    assert Clocked.order == [first, second, second, first, first, second, second, first, first, second]


def test_no_turn_begins_after_the_time_is_up_but_the_first_five() -> None:
    Clocked.order.clear()
    timers: list[Any] = [Clocked(iter([1.0] * 99)), Clocked(iter([1.0] * 99))]
    assert [timing.turns for timing in measuring.in_turns(timers, 50, 0.0)] == [5, 5]
    assert [timing.turns for timing in measuring.in_turns(timers, 7, 60.0)] == [7, 7]


def test_a_batch_is_made_of_the_examples_samples_or_by_a_function() -> None:
    x, y = torch.arange(6).view(3, 2), torch.tensor(2.0)
    made = measuring.batch_of({"x": x, "scale": y, "table": torch.zeros(7)}, 4)
    assert made["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert (made["scale"].tolist(), made["table"].shape) == (2.0, (7,))
    assert measuring.batch_of(lambda size: (torch.ones(size),), 3)[0].shape == (3,)
    with pytest.raises(FxpruneError, match="the example has no tensor with samples: give a function from a batch size"):
        measuring.batch_of({"text": "abc"}, 2)


@layers(lambda: dict(layer=nn.Linear(4, 3)))
def OfTwo(self, x: Tensor) -> Tensor:
    """Takes batches of two only."""
    return self.layer(x).view(2, 3)


def test_what_cannot_be_measured_is_refused() -> None:
    model, small = residual()
    with pytest.raises(FxpruneError, match=r"the model fails on a batch of 3 \(RuntimeError: .*give batch_sizes="):
        fxprune.measure_latency(OfTwo(), OfTwo(), torch.zeros(2, 4), (3,), **QUICK)
    with pytest.raises(FxpruneError, match="the model is on cpu, and the smaller one on meta: move one to the other"):
        fxprune.measure_latency(model, small.to("meta"), images()(2), (1,), **QUICK)
    with pytest.raises(FxpruneError, match=r"batch_sizes is \[0\]; it is a list of whole numbers"):
        fxprune.measure_latency(model, model, images()(2), (0,), **QUICK)


def slow(batch: int = 1, seconds: float = 1.0) -> BatchLatency:
    timing = Timing(seconds, seconds, seconds, 5, 5)
    return BatchLatency(batch, timing, timing)


def reasons(model: nn.Module, example: Any, pair: BatchLatency, **options: Any) -> list[str]:
    small: Any = pruned(model, example, **options)
    return list(why_slow(small, fxprune.report(small), pair, "cpu"))


class Wide(nn.Module):
    """Convolutions of 64 and 128 channels."""

    def __init__(self, *, depthwise: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        groups = 64 if depthwise else 1
        self.second, self.norm = nn.Conv2d(64, 64, 3, padding=1, groups=groups), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))


def test_odd_widths_are_a_reason_and_even_ones_are_none() -> None:
    odd = reasons(Wide(), images()(2), slow(), alpha=0.3)
    assert [text for text in odd if "no multiple of 8" in text] == [
        "2 of 2 narrowed layers have a width that is no multiple of 8 (first: 45, second: 45), and kernels work in "
        "blocks: plan with round_to=8"
    ]
    assert not [text for text in reasons(Wide(), images()(2), slow(), alpha=0.3, round_to=8) if "round_to" in text]


def test_layers_that_memory_bounds_are_a_reason() -> None:
    example = torch.zeros(2, 3, 32, 32)
    (text,) = [text for text in reasons(Wide(depthwise=True), example, slow(4), round_to=8) if "bytes" in text]
    assert text.startswith("at batch size 4, ")
    assert "are moved by layers with fewer than 8 MACs a byte (" in text
    assert "depthwise Conv2d" in text
    assert "BatchNorm2d" in text
    dense = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    assert not [t for t in reasons(dense, torch.zeros(2, 64, 16, 16), slow(4), round_to=8, alpha=0.1) if "bytes" in t]


def test_little_work_gone_and_short_operations_are_reasons() -> None:
    found = reasons(Wide(), images()(2), slow(seconds=1e-5), alpha=0.0, round_to=8)
    assert found[0] == "100% of the MACs are left, so there was little to gain: prune more"
    assert any("operations take" in text and "the cost of calling them" in text for text in found)
    assert not any("the cost of calling" in text for text in reasons(Wide(), images()(2), slow(seconds=1.0)))


def test_bytes_are_those_of_activations_and_weights() -> None:
    graph: Any = pruned(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Flatten()), torch.zeros(2, 6))
    linear, relu = node_costs(graph)
    assert (linear.kind, linear.macs, linear.activations, linear.weights) == ("Linear", 24, 4 * 10, 4 * 28)
    assert (relu.kind, relu.macs, relu.activations, relu.weights) == ("ReLU", 0, 4 * 8, 0)
    assert linear.bytes_at(3) == 3 * 40 + 112
    assert linear.is_memory_bound(1)
    assert relu.is_memory_bound(1000)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [((0.5, 0.4, 0.8), "faster"), ((0.5, 0.4, 0.9), "unclear"), ((0.96, 0.95, 0.97), "not faster"),
     ((2.0, 1.0, 3.0), "not faster")],
)  # fmt: skip
def test_a_verdict_needs_a_gain_and_times_that_lie_apart(after: tuple[float, float, float], verdict: str) -> None:
    pair = BatchLatency(8, Timing(1.0, 0.9, 1.1, 5, 5), Timing(*after, 5, 5))
    assert pair.verdict == verdict
    said = MeasuredLatency("cpu", 1, (pair,)).explained()
    assert (
        said
        == {
            "faster": (),
            "unclear": ("the spread at batch size 8 is too wide to tell: measure on a machine that is idle",),
            "not faster": ("not faster at batch size 8",),
        }[verdict]
    )


@pytest.mark.wide
def test_the_benchmark_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[1] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    command = ["latency.py", "--quick", "--seconds", "0", "--out", str(tmp_path), "--resume"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(folder / "latency.py"), run_name="__main__")
    before = (tmp_path / "latency.json").read_text(encoding="utf-8")
    runpy.run_path(str(folder / "latency.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "measure")
    assert (tmp_path / "latency.json").read_text(encoding="utf-8") == before
    lines = (tmp_path / "latency.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| tiny")]
    assert [(row[1], row[4]) for row in rows] == [("8", "1"), ("8", "4"), ("1", "1"), ("1", "4")]
    found = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))
    assert [entry["round_to"] for entry in found] == [8, 1]
    assert all(entry["macs"][1] <= 0.5 * entry["macs"][0] for entry in found)


def test_a_missing_gpu_is_no_remark_on_the_terminal(tmp_path: Path) -> None:
    """torch logs one where it finds CUDA's compiler without a GPU, as soon as its timers are imported."""
    program = (
        "import torch; from fxprune.caller.timing import timer_of\n"
        "timer = timer_of(torch.nn.Linear(2, 2), torch.zeros(1, 2), torch.device('cpu'), 1)\n"
        "print(timer.timeit(1).median > 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"CUDA_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (found.stdout, found.stderr) == ("True\n", "")
