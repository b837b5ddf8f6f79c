"""The bias of a layer, or the parameter that takes its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxprune.coupling.readers import Reader


def bias_of(reader: Reader) -> Tensor:
    """The bias of a layer as (groups, outputs) of float64; zeros where it has none."""
    shape = reader.matrix().shape[:2]
    if reader.bias is None:
        return torch.zeros(shape, dtype=torch.float64, device=reader.weight.device)
    return reader.bias.detach().double().reshape(shape)


def is_shared(reader: Reader, uses: Counter[int]) -> bool:
    """Whether the weight or bias of a layer is used more than once, by the uses of all tensors."""
    return uses[id(reader.weight)] > 1 or (reader.bias is not None and uses[id(reader.bias)] > 1)


def takes_bias(reader: Reader, norm: nn.Module | None, *, new: bool = True) -> bool:
    """Whether a constant can be added to the output of a layer, before the BatchNorm that follows, if one does.

    `new` says whether a bias may be created for it.
    """
    return reader.bias is not None or norm is not None or (new and reader.owner is not None)


def add_to_bias(reader: Reader, norm: nn.Module | None, constant: Tensor) -> None:
    """Add a constant (channels,) to the output of a layer: to its bias, through the BatchNorm, or as a new bias."""
    if reader.bias is not None:
        reader.bias.data += constant.to(reader.bias)
    elif norm is not None and isinstance(norm.running_mean, Tensor):
        norm.running_mean -= constant.to(norm.running_mean)
    elif reader.owner is not None and bool(constant.any()):
        reader.owner.bias = nn.Parameter(constant.to(reader.weight), requires_grad=reader.weight.requires_grad)


def restorer(reader: Reader, norm: nn.Module | None) -> Callable[[], None]:
    """A function that restores the weight of a layer, and what takes the place of its bias, as they are now."""
    mean = getattr(norm, "running_mean", None)
    held = [(tensor, tensor.detach().clone()) for tensor in (reader.weight, reader.bias, mean) if tensor is not None]

    def restore() -> None:
        for tensor, before in held:
            tensor.data.copy_(before)
        if reader.bias is None and reader.owner is not None and hasattr(reader.owner, "bias"):
            reader.owner.register_parameter("bias", None)

    return restore
