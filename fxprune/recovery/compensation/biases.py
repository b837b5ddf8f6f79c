"""Where a constant goes that is to be added to what a layer gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.coupling.readers import Reader


def bias_of(reader: Reader) -> Tensor:
    """The bias of a layer as (groups, outputs) of float64; zeros where it has none."""
    shape = reader.matrix().shape[:2]
    if reader.bias is None:
        return torch.zeros(shape, dtype=torch.float64, device=reader.weight.device)
    return reader.bias.detach().double().reshape(shape)


def takes_bias(reader: Reader, norm: nn.Module | None) -> bool:
    """Whether a constant can be added to the output of a layer, before the BatchNorm that follows, if one does."""
    return reader.bias is not None or norm is not None or reader.owner is not None


def add_to_bias(reader: Reader, norm: nn.Module | None, constant: Tensor) -> None:
    """Add a constant (channels,) to what a layer gives: to its bias, by the BatchNorm behind it, or by a new bias."""
    if reader.bias is not None:
        reader.bias.data += constant.to(reader.bias)
    elif norm is not None and isinstance(norm.running_mean, Tensor):
        norm.running_mean -= constant.to(norm.running_mean)
    elif reader.owner is not None and bool(constant.any()):
        reader.owner.bias = nn.Parameter(constant.to(reader.weight), requires_grad=reader.weight.requires_grad)
