"""All tensors of a model by name, and putting others in their places."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

INDEX = "_fxprune_index_"  # prefix of the buffers that hold gathering indices; they are not part of the state_dict


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has, also those outside the state_dict.

    Left out are the gathering indices that rewriting put in: they follow from the plan.
    """
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in held if not name.rpartition(".")[2].startswith(INDEX)}


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name of a tensor that has an earlier name: that name."""
    first: dict[int, str] = {}
    earlier = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: found for name, found in earlier.items() if name != found}


def memory_format_of(tensor: Tensor) -> str | None:
    """The name of a tensor's memory format where it is not plain: "channels_last" or "channels_last_3d".

    Strides decide: where an axis has one entry, a tensor is contiguous in several formats, but kernels look at strides.
    """
    shaped = torch.empty(tensor.shape, device="meta")
    for name, layout in FORMATS.items():
        if tensor.ndim == RANKS[name] and tensor.stride() != shaped.stride():
            return name if tensor.stride() == laid_out(shaped, layout).stride() else None
    return None


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of a tensor in a memory format, with its strides."""
    return torch.empty_like(tensor, memory_format=layout).copy_(tensor)


FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
RANKS = {"channels_last": 4, "channels_last_3d": 5}


def without_place(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that are no biases which the modules of `model` could have and have not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [name for name in names if not _is_free(modules.get(name.rpartition(".")[0]), name.rpartition(".")[2])]


def _is_free(module: nn.Module | None, name: str) -> bool:
    return module is not None and name in module._parameters and module._parameters[name] is None


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the tensor called `name` the numbers and the memory format of `value`; a bias that is not there is made.

    Every other name of the tensor sees the new numbers too.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter, buffer = owner._parameters.get(leaf), owner._buffers.get(leaf)
    held = buffer if parameter is None else parameter
    if held is None:
        beside = next((p.device for p in owner.parameters(recurse=False)), value.device)
        setattr(owner, leaf, nn.Parameter(value.detach().to(beside, copy=True)))
    elif held.stride() == value.stride():
        held.data.copy_(value)  # in place: a recurrent layer's weights are parts of one block on some devices
    else:
        held.data = value.detach().to(held.device, copy=True)


def dtype_name(tensor: Tensor) -> str:
    """A tensor's dtype without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")


def bytes_of(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def fingerprint(model: nn.Module) -> int:
    """A checksum of the bytes of a model's parameters and buffers, with their names, in order."""
    total = 0
    for name, value in named_tensors(model).items():
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data, total)
    return total
