"""The accuracy of a model, and its latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.caller.batches import LONGEST_EPOCH, Unpack, batches
from fxprune.caller.example import as_call, to_device
from fxprune.caller.isolation import device_of, evaluating
from fxprune.cli.output import Bars
from fxprune.errors import FxpruneError
from fxprune.tracing.part import call_whole

Metric = Callable[[nn.Module, Iterable[Any]], float]
ROUNDS = 7


def accuracy(model: nn.Module, loader: Iterable[Any], unpack: Unpack | None = None) -> float:
    """The share of samples whose class has the largest of the model's outputs (N, classes).

    Raises FxpruneError where outputs or targets have another form.

    >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
    0.75
    """
    right = total = 0
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        for inputs, targets in batches(loader, unpack, name="the evaluation's loader", most=LONGEST_EPOCH):
            output = call_whole(model, to_device(inputs, device), targets, run=None)
            _check(output, targets)
            right += int((output.argmax(1).cpu() == targets.cpu()).sum())
            total += len(targets)
    return right / total


def _check(output: Any, targets: Any) -> None:
    """Raise where a batch has no right and wrong classes."""
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (output, targets)]
    fits = isinstance(output, Tensor) and isinstance(targets, Tensor) and output.ndim == 2 and targets.ndim == 1
    if not fits or len(output) != len(targets) or targets.is_floating_point():
        raise FxpruneError(
            f"the model gives {shapes[0]} for targets {shapes[1]}, and accuracy needs (N, classes) for (N,) class "
            "numbers: pass --metric, a function (model, loader) -> number"
        )


def latencies(models: Sequence[nn.Module], batch: Any, bars: Bars) -> list[float]:
    """Milliseconds that each model takes for a batch: the median over rounds in which every model takes its turn."""
    from torch.utils.benchmark import Timer  # which looks for compilers when it is imported

    args, kwargs = as_call(to_device(batch, device_of(models[0])))
    call = "model(*args, **kwargs)"
    threads = torch.get_num_threads()
    timers = [Timer(call, globals={"model": m, "args": args, "kwargs": kwargs}, num_threads=threads) for m in models]
    with torch.inference_mode():
        rounds = [[timer.timeit(1).median for timer in timers] for _ in bars.steps(range(ROUNDS), "rounds")]
    return [1e3 * median(times) for times in zip(*rounds, strict=True)]
