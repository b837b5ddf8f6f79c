"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.caller.batches import sample_count
from fxprune.capture import facts_on


def parameters(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's formulas)."""
    return sum(facts_on(model, example).flops.values()) // 2 // sample_count(example)
