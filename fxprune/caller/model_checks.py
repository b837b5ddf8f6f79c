"""Checks that the modules of a model can be listed and called, whatever their classes override."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxprune.errors import CaptureError, a_kind, error_text

_LISTS: dict[str, type] = {
    "named_modules": nn.Module, "modules": nn.Module, "named_parameters": Tensor, "parameters": Tensor,
    "named_buffers": Tensor, "buffers": Tensor, "named_children": nn.Module, "children": nn.Module,
}  # fmt: skip
_STORES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def check_made(model: nn.Module) -> None:
    """Raise CaptureError where a module is not initialised, is lazy, or overrides a listing of its contents wrongly.

    Or where its numbers are on other ranks, or offloaded by accelerate.

    >>> check_made(nn.LazyLinear(3))
    Traceback (most recent call last):
    fxprune.errors.CaptureError: weight of LazyLinear has no shape yet: run the model once on a batch, model(x), before
    """
    name = type(model).__name__
    for path, module in list(_modules(model)):
        _check_lookup(module, f"{path} of {name}" if path else name)
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CaptureError(f"{path or 'the model'} is wrapped in {type(module).__name__}, and {_SPREAD}")
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                whole = f"{path}.{leaf}" if path else leaf
                raise CaptureError(
                    f"{whole} of {name} has no shape yet: run the model once on a batch, model(x), before"
                )
            if tensor is not None and (where := _elsewhere(module, tensor)):
                raise CaptureError(f"{path}.{leaf} of {name} ".removeprefix(".") + where)
        for method, kind in _LISTS.items():
            if module is model or getattr(type(module), method) is not getattr(nn.Module, method):
                _check_list(module, method, kind)


_FOLDER = "or save it, and prune the folder with fxprune.integrations.blockwise.compress_folder"
_SPREAD = (
    "each rank holds a part of its weights: gather them with get_model_state_dict of "
    "torch.distributed.checkpoint.state_dict and StateDictOptions(full_state_dict=True), and load them into a plain "
    f"model; {_FOLDER}"
)


def _elsewhere(module: nn.Module, tensor: Tensor) -> str:
    """Why this process does not have all numbers of a tensor of a module, and the remedy; empty where it has."""
    if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
        return f"is a DTensor: {_SPREAD}"
    if tensor.is_meta and "_hf_hook" in vars(module):
        return f"is offloaded by accelerate: load the model without a device map; {_FOLDER}"
    return ""


def check_forward(model: nn.Module) -> None:
    """Raise CaptureError where the arguments of a model's forward are not known.

    >>> model = nn.Module()
    >>> model.forward = None
    >>> check_forward(model)
    Traceback (most recent call last):
    fxprune.errors.CaptureError: the forward of Module has no signature (TypeError: None is not a callable object): \
define forward(self, ...) in Python
    """
    try:
        inspect.signature(model.forward)
    except Exception as error:
        text = f"the forward of {type(model).__name__} has no signature ({error_text(error)})"
        raise CaptureError(f"{text}: define forward(self, ...) in Python") from error


def if_of_transformers(value: Any) -> str:
    """The end of a message about a model of Hugging Face transformers, or its output; empty for others."""
    if not _is_of_transformers(value):
        return ""
    return (
        "; for a model of transformers, call fxprune.integrations.huggingface.compress_pretrained(model, loader, ...)"
    )


def if_in_folder(model: nn.Module) -> str:
    """The end of a message about a model of transformers that has no numbers yet; empty for others."""
    if not _is_of_transformers(model):
        return ""
    return "; fxprune.integrations.blockwise.compress_folder prunes a folder block by block"


def _is_of_transformers(value: Any) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(value).__mro__)


def _modules(model: nn.Module, path: str = "", around: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model with its path, from its `_modules`; raises where a module holds itself."""
    place = path or "the model"
    held = getattr(model, "__dict__", {})
    if not isinstance(model, torch.jit.ScriptModule) and any(held.get(store) is None for store in _STORES):
        raise CaptureError(
            f"{place} is {a_kind(model)} that was not initialised: call super().__init__() first in its __init__"
        )
    if any(module is model for module in around):
        raise CaptureError(
            f"{place} is a module that holds itself, through its submodules: keep a reference to it in a list, "
            "[module], in place of an attribute"
        )
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from _modules(child, f"{path}.{name}" if path else name, (*around, model))


def _check_lookup(module: nn.Module, where: str) -> None:
    """Raise CaptureError where a module raises anything but AttributeError for an attribute that it does not have."""
    try:
        getattr(module, "_fxprune_absent", None)
    except Exception as error:
        text = f"__getattr__ of {where} fails on a name that is not there ({error_text(error)})"
        raise CaptureError(f"{text}: let it raise AttributeError") from error


def _check_list(module: nn.Module, method: str, kind: type) -> None:
    """Raise CaptureError where a method fails, or lists anything but modules or tensors (with names, if `named_`)."""
    try:
        found = list(getattr(module, method)())
        wrong = [entry for entry in found if not isinstance(entry[1] if "named" in method else entry, kind)]
        what = f"gives {a_kind(wrong[0])}" if wrong else ""
    except Exception as error:  # noqa: BLE001 - the class is the user's
        what = f"fails ({error_text(error)})"
    if what:
        raise CaptureError(f"{type(module).__name__}.{method} {what}: let it list what nn.Module.{method} does")
