"""Calls in which some tensors have numbers and some are on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.isolation import attributes_restored
from fxprune.caller.meta import META

PLACES = frozenset({"device", "is_cuda", "is_cpu", "is_meta", "get_device", "type", "data_ptr"})


def call_on_meta(function: Callable[..., Any], args: Any, kwargs: Any, place: torch.device) -> Any:
    """Call a function with all tensors on the meta device if any is there; `place` is the answer to device queries."""
    leaves = pytree.tree_leaves((args, kwargs))
    given = [leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor)]
    own = [t.is_meta for t in _tensors(function)] if isinstance(function, nn.Module) else []
    if not any(given) and not any(own):
        return function(*args, **kwargs)
    name = args[1] if function is getattr else getattr(function, "__name__", "")
    if name in PLACES and isinstance(args[0], Tensor) and (function is getattr or len(args) + len(kwargs) == 1):
        return function(torch.empty(0, dtype=args[0].dtype, device=place), *args[1:])
    if not all(given) or any(isinstance(leaf, torch.device) for leaf in leaves):
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(META), (args, kwargs))
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: META, (args, kwargs))
    with weightless(function) if isinstance(function, nn.Module) and not all(own) else nullcontext():
        return function(*args, **kwargs)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, with a fast path for modules without submodules."""
    if module._modules:
        return [*module.parameters(), *module.buffers()]
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def method(name: str) -> Callable[..., Any]:
    """The method of that name as a function of its object."""

    def call(own: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(own, name)(*args, **kwargs)

    call.__name__ = name
    return call


@contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """Replace every parameter and buffer by a meta tensor, and restore them afterwards."""
    with attributes_restored(model):
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                store.update({name: None if tensor is None else shape_only(tensor) for name, tensor in store.items()})
            if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
                module._flat_weights = [None if t is None else shape_only(t) for t in module._flat_weights]
        yield


def shape_only(tensor: Tensor) -> Tensor:
    """A meta tensor of the same shape and dtype."""
    return torch.empty_like(tensor, device="meta", requires_grad=False)
