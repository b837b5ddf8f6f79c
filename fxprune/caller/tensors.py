"""All tensors of a model by name: looking them up, replacing them, their memory formats and checksums."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

INDEX = "_fxprune_index_"  # prefix of the buffers that hold gathering indices; they are not part of the state_dict
FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
RANKS = {"channels_last": 4, "channels_last_3d": 5}


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, including those outside the state_dict."""
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`all_tensors` without the gathering indices that rewriting added, which follow from the plan."""
    return {name: t for name, t in all_tensors(model).items() if not name.rpartition(".")[2].startswith(INDEX)}


def held_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter, buffer and tensor attribute of a model's modules, under every name, with its module."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, held in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(held, Tensor):
                yield f"{path}.{name}" if path else name, module, held


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`first_names` without the first names themselves."""
    return {name: first for name, first in first_names(tensors).items() if name != first}


def attribute_at(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, such as "layer1.0.weight", or None where there is none."""
    try:
        return attrgetter(path)(model)
    except AttributeError:
        return None


def memory_format_of(tensor: Tensor) -> str | None:
    """The name of a tensor's memory format: "channels_last", "channels_last_3d", or None where it is plain.

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


def without_place(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not empty parameters of modules of `model`, such as a bias that was left out."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def is_free(path: str, leaf: str) -> bool:
        return path in modules and modules[path]._parameters.get(leaf, modules) is None

    return [name for name in names if not is_free(name.rpartition(".")[0], name.rpartition(".")[2])]


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the tensor called `name`, and all that share it, the numbers and memory format of `value`.

    A bias that does not exist is created.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if held is None:
        beside = next((p.device for p in owner.parameters(recurse=False)), value.device)
        setattr(owner, leaf, nn.Parameter(value.detach().to(beside, copy=True)))
    elif held.stride() == value.stride():
        held.data.copy_(value)  # in place: a recurrent layer's weights are parts of one block on some devices
    else:
        held.data = value.detach().to(held.device, copy=True)


def in_transform() -> bool:
    """Whether torch.vmap or a transform of torch.func is at work, whose tensors have no numbers of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


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
