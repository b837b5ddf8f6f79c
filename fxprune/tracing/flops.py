"""Floating-point operations as torch counts them, with formulas for what its counter lacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def _layer_flops(x: torch.Size, inputs: torch.Size, hidden: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of one recurrent layer, which has a weight for its inputs and one for its hidden units."""
    return _flops(x, [inputs, hidden])


def _flops(x: torch.Size, weights: list[torch.Size], *rest: Any, **kwargs: Any) -> int:
    """Flops of recurrent layers: every step of every sequence meets every matrix."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of attention, as torch counts them on other devices: those of its two matrix products."""
    return int(sdpa_flop_count(q, k, v))


FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _layer_flops,
    torch.ops.aten._cudnn_rnn: _flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}  # those that torch's counter does not have


class _Whole(ModuleTracker):
    """Tells no module from another: the hooks by which torch does fail on views of values that need gradients."""

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *raised: object) -> None: ...


def counting() -> FlopCounterMode:
    """Count the flops of what runs within it, whether or not it needs gradients."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _Whole()
    return counter
