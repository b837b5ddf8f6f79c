"""Copies of models, and contexts that undo the changes that work on a model makes to it and to the process."""

from __future__ import annotations

import copy
import os
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from operator import attrgetter
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.caller.computed_weights import stored_weights
from fxprune.caller.functions import FUNCTIONS, copied, held_copy
from fxprune.caller.interrupts import DeferredInterrupts
from fxprune.caller.meta import computing, has_numbers, on_meta
from fxprune.errors import CaptureError, error_text, is_out_of_memory

Model = TypeVar("Model", bound=nn.Module)

_DEEPEST = 3  # containers inside of containers that are looked into
FORWARD_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def isolated_copy(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `model` that shares nothing with it; fake tensors become meta tensors.

    Forward hooks and functions on modules are copied with their closures, see `fxprune.caller.functions`; other hooks
    are left out. `instead` maps ids of objects to their replacements.

    Raises CaptureError where the model cannot be copied.
    """
    stored = list(stored_weights(model))
    memo: dict[int, Any] = (
        ready_copies(model) | on_meta(model) | {id(weight): weight.detach().clone() for weight in stored}
    )
    memo |= dict(instead or {})
    for module in model.modules():
        memo |= {id(getattr(module, name)): OrderedDict() for name in HOOKS if hasattr(module, name)}
    try:
        own: nn.Module = copy.deepcopy(model, memo)
        parts = {id(part) for part in own.modules()}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(_cannot_be_copied(model, error_text(error))) from error
    _check_apart(model, parts, instead or {})
    for module in model.modules():
        if id(module) in memo and id(module) not in (instead or {}):
            _copy_functions(module, memo[id(module)], memo)
    return own


def _check_apart(model: nn.Module, own: Collection[int], instead: Mapping[int, object]) -> None:
    """Raise CaptureError where a copy shares a module with the model; `own` are the ids of the copy's modules."""
    inserted = {id(part) for new in instead.values() if isinstance(new, nn.Module) for part in new.modules()}
    for path, module in model.named_modules():
        if id(module) in own and id(module) not in inserted:
            raise CaptureError(_cannot_be_copied(model, f"the __deepcopy__ of {path or 'the model'} gives itself"))


def applied(model: Model, method: str, *args: Any) -> Model:
    """`model`, after a call of a method that changes it (eval, train, to), whatever the method returns.

    Raises CaptureError where the method fails, because a class may override it.
    """
    try:
        getattr(model, method)(*args)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(
            f"{type(model).__name__}.{method} fails ({error_text(error)}): look at the methods train, eval, to and "
            "__setattr__ that the classes of its modules override, or leave them as torch has them"
        ) from error
    return model


def _copy_functions(module: nn.Module, own: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the functions and forward hooks of a module to its copy."""
    for name, value in vars(module).items():
        if isinstance(value, FUNCTIONS):
            vars(own)[name] = copied(value, memo) if name == "forward" else held_copy(value, memo)
    for name in FORWARD_HOOKS:
        for key, hook in getattr(module, name, {}).items():
            getattr(own, name)[key] = copied(hook, memo)


def _cannot_be_copied(model: nn.Module, error: str) -> str:
    """The message for a model that cannot be deep-copied; it names the computed tensors on its modules."""
    computed = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    named = f"; {', '.join(computed)} was computed by an earlier forward, or by a hook" if computed else ""
    return (
        f"{type(model).__name__} cannot be deep-copied ({error}{named}): remove what cannot be copied, such as results "
        "of an earlier forward that are kept on a module: set them to None, or detach them"
    )


def ready_copies(model: nn.Module) -> dict[int, object]:
    """A memo for deep copies: new dicts and sets for all empty ones, which would take most of the time.

    Immutable mappings of plain values that refuse to be copied are shared.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    shared = {id(found): found for value in values for found in _mappings(value) if _refuses_copies(found)}
    return shared | {
        id(value): type(value)() for value in values if type(value) in (dict, set, OrderedDict) and not value
    }


def _mappings(value: Any, depth: int = 0) -> Iterator[Mapping[Any, Any]]:
    """A mapping and those inside of it, or those inside of a list or tuple."""
    if isinstance(value, Mapping):
        yield value
    if depth < _DEEPEST and isinstance(value, (Mapping, list, tuple)):
        for entry in list(value.values() if isinstance(value, Mapping) else value):
            yield from _mappings(entry, depth + 1)


def _refuses_copies(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping of plain values cannot be deep-copied."""
    if type(value) in (dict, OrderedDict) or not _is_plain(value):
        return False
    try:
        copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - whatever the caller's class raises where it is written to
        return True
    return False


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings and containers of them."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of every module, and the entries of its dicts (buffers, hooks), afterwards."""
    own = [vars(module) for module in model.modules()]
    stores = own + [value for store in own for value in store.values() if isinstance(value, dict)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, old in zip(stores, before, strict=True):
            if store.keys() != old.keys() or any(store[name] is not value for name, value in old.items()):
                store.clear()
                store.update(old)


@contextmanager
def stateless(model: nn.Module) -> Iterator[None]:
    """Replace buffers and tensor attributes by copies that a forward may change, and restore them afterwards."""
    copies: dict[int, Tensor] = {}
    with attributes_restored(model):
        for module in model.modules():
            for store in (module._buffers, vars(module)):
                held = {name: value for name, value in store.items() if type(value) is Tensor}
                store.update({name: copies.setdefault(id(t), t.clone()) for name, t in held.items()})
        yield


_ALONE = {"lock": RLock()}  # on what all threads share: random generators, and what tracing replaces in torch
if hasattr(os, "register_at_fork"):  # a child process has none of the threads that may hold the lock
    os.register_at_fork(after_in_child=lambda: _ALONE.update(lock=RLock()))


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Work alone with gradients enabled, outside inference mode, autocast, FakeTensorMode and the meta device.

    Other threads wait for their turn. The states of all random generators, torch's deterministic mode and its fast path
    through transformer layers are restored at the end. An interrupt is raised only where everything is restored, see
    `DeferredInterrupts`.
    """
    with ExitStack() as stack:
        interrupts, lock = DeferredInterrupts(), _ALONE["lock"]
        stack.enter_context(interrupts)
        interrupts.wait_for(lock)
        stack.callback(lock.release)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        mha: Any = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        for context in (torch.random.fork_rng(devices), torch.inference_mode(mode=False), torch.enable_grad()):
            stack.enter_context(context)
        for kind in ("cpu", "cuda"):  # nothing is exact in the dtype of autocast
            stack.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
            torch.set_autocast_enabled(kind, False)  # noqa: FBT003 - takes no names
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # an autocast inside of this one would not empty it
        stack.enter_context(computing())
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield


def seeded(seed: int) -> AbstractContextManager[None]:
    """Work `undisturbed`, with all random generators at `seed`."""
    return undisturbed(int(seed))  # torch takes no integers of NumPy


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 numbers in full precision.

    By default a GPU rounds those of convolutions and recurrent layers to ten bits (TF32), and those of matrix products
    where `torch.set_float32_matmul_precision` allows it: equal models then differ by more than `verify` allows, and a
    GPU differs from the CPU.
    """
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as stack:
        try:
            for_matrices, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        except RuntimeError:  # the precision was set operation by operation
            for_matrices, tf32 = "highest", False
        if for_matrices != "highest":
            stack.callback(torch.set_float32_matmul_precision, for_matrices)
            torch.set_float32_matmul_precision("highest")
        if tf32:
            stack.callback(setattr, cudnn, "allow_tf32", tf32)
            cudnn.allow_tf32 = False
        by_operation = hasattr(cudnn, "conv")  # since torch 2.9
        for path in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
            operation: Any = attrgetter(path)(torch.backends) if by_operation else None
            if by_operation and operation.fp32_precision in ("tf32", "bf16"):
                stack.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
                operation.fp32_precision = "ieee"
        yield


@contextmanager
def on_device(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Move models to a device, or leave them in place for None, and each back to its own device afterwards."""
    homes = [device_of(model) for model in models]
    try:
        for model in models if device is not None else ():
            applied(model, "to", device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            applied(model, "to", home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore the modes of its modules and the numbers of its buffers afterwards."""
    with in_eval_mode(model), kept_buffers(model):
        yield


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the numbers of buffers that a forward changes; they keep no history of gradients."""
    held = [(b, None if b.is_inference() else b._version, b.clone()) for b in model.buffers() if has_numbers(b)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, before in held:
                if version is None or buffer._version != version:  # torch does not count changes in inference mode
                    buffer.copy_(before)
                if buffer.requires_grad and not before.requires_grad and not buffer._is_view():
                    buffer.detach_()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode, and restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        applied(model, "eval")
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # a class may refuse to set it
                module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, or the CPU."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating dtype of the model's first parameter or buffer, or torch's default."""
    dtypes = (tensor.dtype for tensor in chain(model.parameters(), model.buffers()))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())
