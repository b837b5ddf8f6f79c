"""How long calls take; the clock is read once the device has finished its work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fxprune.caller.example import as_call

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

T = TypeVar("T")


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call, and the seconds that it took on a device."""
    start = time.perf_counter()
    result = call()
    return result, _clock(device) - start


def timer_of(model: nn.Module, batch: Any, device: torch.device, threads: int) -> Timer:
    """A timer of one model's call on a batch."""
    Timer = _timer_class()
    args, kwargs = as_call(batch)
    names = {"model": model, "args": args, "kwargs": kwargs}
    return Timer("model(*args, **kwargs)", globals=names, timer=lambda: _clock(device), num_threads=threads)


def _timer_class() -> type[Timer]:
    """The class of timers of torch, whose module looks for CUDA; its remark about a missing GPU is left out."""
    log = logging.getLogger("torch.utils.cpp_extension")
    log.addFilter(_is_no_remark)
    try:
        from torch.utils.benchmark import Timer
    finally:
        log.removeFilter(_is_no_remark)
    return Timer


def _is_no_remark(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")


def _clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
