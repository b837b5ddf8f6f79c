"""The third way to a graph: the program of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.capture.checks import Leaves
from fxprune.capture.graph import ModelGraph
from fxprune.errors import CaptureError


def trace(
    model: nn.Module, example: Any, *, concrete_args: Mapping[str, Any] | None = None, leaves: Leaves = ()
) -> ModelGraph:
    """Trace `model`, a copy of our own in eval mode, and return its graph."""
    raise CaptureError(f"{type(model).__name__} cannot be exported yet")
