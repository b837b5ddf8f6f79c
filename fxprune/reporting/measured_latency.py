"""Measured latency of a model and a smaller one, which take turns under torch.utils.benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.example import to_device
from fxprune.caller.isolation import device_of, evaluating, undisturbed
from fxprune.caller.timing import timer_of
from fxprune.errors import FxpruneError, blaming
from fxprune.reporting.report import reported, with_report
from fxprune.reporting.timings import BatchLatency, MeasuredLatency, Timing
from fxprune.reporting.why_slow import why_slow
from fxprune.tracing.graph import ModelGraph

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement, Timer

TURN = 0.02  # seconds of calls in each turn of a model; one call at least
REMEDY = ": give batch_sizes= that it takes, or as example= a function from a batch size to a batch"
FEWEST = 5  # turns, however long they take


def measure_latency(
    model: nn.Module,
    small: nn.Module,
    example: Any,
    batch_sizes: Sequence[int] = (1, 32),
    *,
    repeats: int = 30,
    seconds: float = 20.0,
    threads: int | None = None,
    note: bool = True,
) -> MeasuredLatency:
    """Measure how long a model and a smaller one take on batches of given sizes, in eval mode.

    The two take turns, so that a busy moment of the machine affects both, and the one that begins alternates. Each turn
    begins with a call that does not count, and the clock is read when the device is done.

    Args:
        model, small: on one device; the small one from `compress`, `apply`, `finetune` or `load`, or any other module.
        example: a batch as the model takes it, whose samples are repeated or dropped to make up the sizes; or a
            function from a batch size to such a batch.
        repeats: turns of each model at each batch size.
        seconds: time after which no further turn begins at a batch size, though there are always five.
        threads: number for operations on the CPU; torch's setting by default.
        note: put the result into the report of `small`, where it has one.

    Raises:
        FxpruneError: the models are on two devices, or one fails on a batch.
    """
    check(measure_latency, locals())
    homes = [device_of(each) for each in (model, small)]
    if homes[0] != homes[1]:
        raise FxpruneError(f"the model is on {homes[0]}, and the smaller one on {homes[1]}: move one to the other")
    count = torch.get_num_threads() if threads is None else threads
    pairs = []
    with undisturbed(), torch.no_grad(), evaluating(model), evaluating(small):
        for size in batch_sizes:
            batch = to_device(batch_of(example, size), homes[0])
            timers = [timer_of(each, batch, homes[0], count) for each in (model, small)]
            for name, timer in zip(("the model", "the smaller model"), timers, strict=True):
                with blaming(name, f"a batch of {size}", REMEDY):
                    timer.timeit(1)
            pairs.append(BatchLatency(size, *in_turns(timers, repeats, seconds)))
    name = torch.cuda.get_device_name(homes[0]) if homes[0].type == "cuda" else str(homes[0])
    found = MeasuredLatency(name, count, tuple(pairs), _reasons(small, pairs, homes[0].type))
    if note:
        for graph, _ in reported(small):
            with_report(graph, latency=found)
    return found


def batch_of(example: Any, size: int) -> Any:
    """A batch of `size` samples: the result of a function, or an example's samples, repeated or dropped.

    >>> batch_of(torch.arange(3), 5)
    tensor([0, 1, 2, 0, 1])
    """
    if callable(example):
        with blaming("example=", f"a batch of {size}", ": it is a batch, or a function from a batch size to one"):
            return example(size)
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or not len(tensors[0]):
        raise FxpruneError("the example has no tensor with samples: give a function from a batch size to a batch")
    samples = len(tensors[0])

    def resized(tensor: Tensor) -> Tensor:
        fits = tensor.ndim and len(tensor) == samples
        return tensor[torch.arange(size, device=tensor.device) % samples] if fits else tensor

    return pytree.tree_map_only(Tensor, resized, example)


def in_turns(timers: Sequence[Timer], repeats: int, seconds: float) -> Iterator[Timing]:
    """The times of two models, turn by turn; each turn is a call that does not count, and calls for `TURN` seconds."""
    turns: list[list[Measurement]] = [[] for _ in timers]
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST and time.perf_counter() - start > seconds:
            break
        order = range(len(timers)) if turn % 2 == 0 else reversed(range(len(timers)))
        for index in order:
            turns[index].append(timers[index].blocked_autorange(min_run_time=TURN))
    for found in turns:
        times = type(found[0]).merge(found)[0].times
        low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
        yield Timing(median, low, high, len(found), len(times))


def _reasons(small: nn.Module, pairs: Sequence[BatchLatency], device: str) -> tuple[str, ...]:
    """Why the small model is not faster at the first batch size where it is not, from its pruned parts."""
    slow = next((pair for pair in pairs if pair.verdict == "not faster"), None)
    graphs = [(graph, report) for graph, report in reported(small) if isinstance(graph, ModelGraph)]
    found = [reason for graph, report in graphs if slow for reason in why_slow(graph, report, slow, device)]
    return tuple(dict.fromkeys(found))
