"""Whether a module replaces a method of the layer class from which it is derived."""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType, MethodType

from torch import nn


def changed(module: nn.Module, layer: type[nn.Module]) -> str | None:
    """The name of a method of `layer` that a module derived from it, or its class, replaces; None without one.

    >>> changed(nn.LazyConv2d(3, 1), nn.Conv2d), changed(nn.Linear(2, 2), nn.Module)
    (None, 'forward')
    """
    own, kind = vars(module), type(module)
    for name in _methods(layer):  # type: ignore[arg-type]
        method, base = getattr(kind, name, None), nn.Module if name in _CALLS[:3] else layer
        if method is not None and name in own and own[name] != MethodType(method, module):
            return name
        if kind is not base and method is not getattr(base, name, None):
            return name
    return None


@lru_cache(maxsize=256)
def _methods(layer: type[nn.Module]) -> tuple[str, ...]:
    """The names of the methods that a call of a layer may run."""
    kinds = [cls for cls in layer.__mro__ if cls not in nn.Module.__mro__]
    names = {name for cls in kinds for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    return ("forward", *_CALLS, *sorted(name for name in names - _ASIDE if not name.startswith("__")))


_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__")
_ASIDE = frozenset({
    "forward", "extra_repr", "reset_parameters", "_reset_parameters", "reset_running_stats", "from_pretrained",
    "initialize_parameters", "flatten_parameters", "_init_flat_weights", "_update_flat_weights", "_apply",
    "_weights_have_changed", "_fill_padding_idx_with_zero", "_load_from_state_dict", "_save_to_state_dict",
    "_replicate_for_data_parallel",
})  # fmt: skip
