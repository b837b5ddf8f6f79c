"""Floating-point operations as torch counts them, with formulas for what its counter lacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def _recurrent_flops(x: torch.Size, *weights: Any, **kwargs: Any) -> int:
    """Flops of recurrent layers: every step of every sequence meets every matrix."""
    shapes = weights[0] if isinstance(weights[0], list) else weights[:2]
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of attention, as torch counts them on other devices: those of its two matrix products."""
    return int(sdpa_flop_count(q, k, v))


FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,  # of one layer: a weight for inputs and one for hidden units
    torch.ops.aten._cudnn_rnn: _recurrent_flops,  # of all layers, whose weights come as one list
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}  # those that torch's counter does not have


class _NoModules(ModuleTracker):
    """Tracks no module: the hooks by which torch does fail on views of values that need gradients."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *raised: object) -> None: ...


def counting() -> FlopCounterMode:
    """Count the flops of what runs within it, whether or not it needs gradients."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _NoModules()
    return counter
