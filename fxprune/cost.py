"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

import math
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


def _layer_flops(x: torch.Size, inputs: torch.Size, hidden: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of one recurrent layer, which has a weight for its inputs and one for its hidden units."""
    return _flops(x, [inputs, hidden])


def _flops(x: torch.Size, weights: list[torch.Size], *rest: Any, **kwargs: Any) -> int:
    """Flops of recurrent layers: every step of every sequence meets every matrix."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _layer_flops, torch.ops.aten._cudnn_rnn: _flops}  # unknown to torch


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's flop counter)."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False, custom_mapping=_RECURRENT) as counter:
        try:
            for parameter in learned:
                parameter.requires_grad_(requires_grad=False)  # the counter fails on views of those with gradients
            model(*placeholder_values(model, example))
        finally:
            for parameter in learned:
                parameter.requires_grad_()
    return int(counter.get_total_flops() // 2 // sample_count(example))
