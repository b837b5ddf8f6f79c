"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.batches import sample_count
from fxprune.capture import placeholder_values
from fxprune.isolation import evaluating


def parameters(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's flop counter)."""
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        model(*placeholder_values(model, example))
    return int(counter.get_total_flops() // 2 // sample_count(example))
