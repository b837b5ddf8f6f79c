"""Whether a model and an example can be captured at all, by whatever method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fxprune.caller.example import as_call, batch_length, check_dense, trim
from fxprune.caller.model_checks import if_of_transformers
from fxprune.caller.tensors import dtype_name
from fxprune.errors import CaptureError, error_text, known_names
from fxprune.tracing.graph import ModelGraph, OwnSource

Entry = str | type[nn.Module]
Leaves = Entry | Sequence[Entry]


def signature_of(model: nn.Module, concrete: Mapping[str, Any]) -> inspect.Signature:
    """The signature of the model's forward without the arguments that are concrete."""
    signature = inspect.signature(model.forward)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in concrete])


def check_names(model: nn.Module) -> None:
    """Raise where a child or parameter has the name of an attribute of every GraphModule."""
    for name in (*model._modules, *model._parameters, *model._buffers):
        if name in _KEPT or (hasattr(ModelGraph, name) and not hasattr(nn.Module, name)):
            raise CaptureError(
                f"{type(model).__name__} has a child called {name!r}, a name that torch.fx.GraphModule keeps: "
                "rename it, or wrap the model in a module of its own"
            )


_SHOWN = 3  # tensors of an example in a message
_KEPT = {"self", *vars(OwnSource(nn.Module(), fx.Graph()))} - vars(nn.Module()).keys()


def check_held(model: nn.Module) -> None:
    """Raise CaptureError where a parameter or buffer is sparse or nested."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_dense(tensor, f"{type(model).__name__}.{name}", CaptureError, strided=True, meta=True)


def listed(entries: Leaves) -> tuple[Entry, ...]:
    """Entries as a tuple, also where a single one was given."""
    return (entries,) if isinstance(entries, (str, type)) else tuple(entries)


def is_named(entries: Sequence[Entry], module: nn.Module, name: str) -> bool:
    """Whether one of the entries (names, glob patterns, types) matches the module called `name`."""
    return any(fnmatchcase(name, e) if isinstance(e, str) else isinstance(module, e) for e in entries)


def check_leaves(model: nn.Module, leaves: Sequence[Entry]) -> None:
    """Raise where an entry of `leaves` names no module."""
    for entry in leaves:
        names = [name for name, _ in model.named_modules()]
        if isinstance(entry, str) and not any(fnmatchcase(name, entry) for name in names):
            close = known_names(entry, names)
            raise CaptureError(f"leaves: no module of {type(model).__name__} matches {entry!r}{close}")


def check_example(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> None:
    """Raise where the example is empty or does not fit the forward, or `concrete` names none of its arguments."""
    whole, signature = inspect.signature(model.forward), signature_of(model, concrete)
    stars = any(parameter.kind is parameter.VAR_KEYWORD for parameter in whole.parameters.values())
    for name in concrete:
        if name not in whole.parameters and not stars:
            raise CaptureError(f"concrete_args names {name!r}, but it is {type(model).__name__}.forward{whole}")
    _check_kind(example)
    args, kwargs = as_call(example)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        keys = f"; it has the keys {list(example)}, of which unpack= can leave some out" * isinstance(example, dict)
        hints = f"{keys}{if_of_transformers(model)}{if_batches(example)}"
        raise CaptureError(
            f"the example does not fit {type(model).__name__}.forward{signature}: {error}. Give a tensor, a tuple of "
            f"the positional arguments, or a dict of the named ones{hints}"
        ) from error
    check_dense(example, "the example", CaptureError, meta=True)
    first = next((t for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim), None)
    if first is not None and not len(first):
        raise CaptureError(f"the example has no samples, its first tensor is {tuple(first.shape)}: give one at least")


def _check_kind(example: Any) -> None:
    """Raise where the example is a loader, or holds arrays of NumPy in place of tensors."""
    if isinstance(example, DataLoader):
        raise CaptureError("the example is a DataLoader: give the inputs of one batch, next(iter(loader))[0] say")
    kinds = {type(leaf) for leaf in pytree.tree_leaves(example)}
    if np.ndarray in kinds and not any(issubclass(kind, Tensor) for kind in kinds):
        raise CaptureError("the inputs are arrays of NumPy: make tensors of them, torch.as_tensor(x)")


def if_batches(example: Any) -> str:
    """The end of a message about an example that is perhaps a list of batches (inputs, targets), as a loader is."""
    entries = example if isinstance(example, (list, tuple)) else ()
    pairs = [isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in entries]
    if not pairs or not all(pairs):
        return ""
    return "; it looks like a loader, a list of batches: give the inputs of one, next(iter(loader))[0] say"


def first_running(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The first batch on which `run` does not fail, and its result.

    Raises CaptureError, which says that the model does not run, where there is none.
    """
    failure, batch = None, None
    for batch in batches:
        try:
            return batch, run(batch)
        except Exception as error:  # noqa: BLE001 - whatever the user's model raises becomes the cause of ours
            failure = error
    raise does_not_run(model, failure, batch) from failure


def does_not_run(model: nn.Module, failure: Exception | None, example: Any = None) -> CaptureError:
    """The error of a model that fails on the example."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    given = ", ".join(f"{tuple(tensor.shape)} {dtype_name(tensor)}" for tensor in tensors[:_SHOWN])
    held = f", which holds {given}{', ...' * (len(tensors) > _SHOWN)}" if tensors else ""
    hints = "; of images as bytes, x.float() / 255" if any(t.dtype == torch.uint8 for t in tensors) else ""
    last = any(t.ndim == 4 and t.shape[3] in (1, 3, 4) and t.shape[1] == t.shape[2] for t in tensors)
    hints += "; of images whose channels come last, x.permute(0, 3, 1, 2)" * last
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if own is not None and any(t.is_floating_point() and t.dtype != own for t in tensors):
        hints += f"; of the weights' dtype, x.to({own}), say"
    return CaptureError(
        f"{type(model).__name__} does not run on the example ({error_text(failure)}){held}: "
        f"give one batch as its forward takes it{hints}{if_batches(example)}"
    )


def cuts(example: Any) -> tuple[Any, ...]:
    """Two samples of an example, where it has more and these can be told apart, and the whole example."""
    cut = trim(example, samples=2)
    return (example,) if cut is example or batch_length(example) <= 2 else (cut, example)


def check_unwrapped(model: nn.Module, leaves: Sequence[Entry] = ()) -> None:
    """Raise where a model or a part of it, leaves excepted, is wrapped by torch.compile or for several devices."""
    for path, module in model.named_modules():
        if not is_named(leaves, module, path):
            check_bare(module, f"{type(model).__name__}.{path}" if path else "the model")


def check_bare(module: nn.Module, place: str = "the model") -> None:
    """Raise where a module is one of torch's wrappers around a model."""
    held = _WRAPPERS.get(type(module).__name__)
    if held is not None and isinstance(getattr(module, held, None), nn.Module):
        raise CaptureError(
            f"{place} is wrapped in {type(module).__name__}, which says how to run it and is no part of it: give what "
            f"is inside, its .{held}, in its place, and wrap what comes back"
        )


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
