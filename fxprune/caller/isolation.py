"""Working on a model without leaving a trace on it or on the process."""

from __future__ import annotations

import copy
import os
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.caller.computed_weights import stored_weights
from fxprune.caller.functions import FUNCTIONS, copied, held_copy
from fxprune.caller.interrupts import Orderly
from fxprune.caller.meta import computing, has_numbers, on_meta
from fxprune.errors import CaptureError, is_of_memory, told

Model = TypeVar("Model", bound=nn.Module)

FORWARD_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def isolated_copy(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `model` that shares nothing with it; fake tensors become meta ones.

    Forward hooks are copied, and so are functions that modules hold, each with what it closes over: see
    `fxprune.caller.functions`. Other hooks are left out. `instead` maps ids of objects to what stands in their places.

    Raises CaptureError where the model cannot be copied.
    """
    stored = list(stored_weights(model))
    memo: dict[int, Any] = empties(model) | on_meta(model) | {id(weight): weight.detach().clone() for weight in stored}
    memo |= dict(instead or {})
    for module in model.modules():
        memo |= {id(getattr(module, name)): OrderedDict() for name in HOOKS if hasattr(module, name)}
    try:
        own: nn.Module = copy.deepcopy(model, memo)
        parts = {id(part) for part in own.modules()}
    except Exception as error:
        if is_of_memory(error):
            raise
        raise CaptureError(_cannot_be_copied(model, told(error))) from error
    _check_apart(model, parts, instead or {})
    for module in model.modules():
        if id(module) in memo and id(module) not in (instead or {}):
            _copy_functions(module, memo[id(module)], memo)
    return own


def _check_apart(model: nn.Module, own: Collection[int], instead: Mapping[int, object]) -> None:
    """Raise CaptureError where the modules of a copy, by their ids, hold one of the model that was not put into it."""
    inserted = {id(part) for new in instead.values() if isinstance(new, nn.Module) for part in new.modules()}
    for path, module in model.named_modules():
        if id(module) in own and id(module) not in inserted:
            raise CaptureError(_cannot_be_copied(model, f"the __deepcopy__ of {path or 'the model'} gives itself"))


def applied(model: Model, method: str, *args: Any) -> Model:
    """`model`, after a method that changes it (eval, train, to) was called, whatever that gives back.

    Raises CaptureError where the method, which a class may override, fails.
    """
    try:
        getattr(model, method)(*args)
    except Exception as error:
        if is_of_memory(error):
            raise
        raise CaptureError(
            f"{type(model).__name__}.{method} fails ({told(error)}): look at the methods train, eval, to and "
            "__setattr__ that the classes of its modules override, or leave them as torch has them"
        ) from error
    return model


def _copy_functions(module: nn.Module, own: nn.Module, memo: dict[int, Any]) -> None:
    """Give the copy of a module copies of the functions and of the forward hooks that the module has."""
    for name, value in vars(module).items():
        if isinstance(value, FUNCTIONS):
            vars(own)[name] = copied(value, memo) if name == "forward" else held_copy(value, memo)
    for name in FORWARD_HOOKS:
        for key, hook in getattr(module, name, {}).items():
            getattr(own, name)[key] = copied(hook, memo)


def _cannot_be_copied(model: nn.Module, error: str) -> str:
    """The message for a model of which no deep copy can be made; it names tensors that were computed, if there are."""
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


def empties(model: nn.Module) -> dict[int, object]:
    """New ones in place of the empty dicts of every module, for a memo: deep copies take most of their time there."""
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in values if type(value) in (dict, set, OrderedDict) and not value}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give every module the attributes back that it had, and what its dicts (of buffers, of hooks) held."""
    own = [vars(module) for module in model.modules()]
    stores = own + [value for store in own for value in store.values() if isinstance(value, dict)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, old in zip(stores, before, strict=True):
            store.clear()
            store.update(old)


@contextmanager
def stateless(model: nn.Module) -> Iterator[None]:
    """Let a forward change copies of the buffers, and of tensors kept as attributes; then give the model's own back."""
    copies: dict[int, Tensor] = {}
    with restored(model):
        for module in model.modules():
            for store in (module._buffers, vars(module)):
                held = {name: value for name, value in store.items() if type(value) is Tensor}
                store.update({name: copies.setdefault(id(t), t.clone()) for name, t in held.items()})
        yield


class _Alone:
    """The lock on what a process has once for all threads: random generators, and what tracing replaces in torch."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):  # a child has none of the threads that may hold it
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Take a lock that nobody holds."""
        self.lock = RLock()


_ALONE = _Alone()


class _Undisturbed(AbstractContextManager[None]):
    """Work alone, and with all that torch is told for a while put back, whatever moment an interrupt comes at."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed, self.stack = seed, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            interrupts = Orderly()
            stack.enter_context(interrupts)
            lock = _ALONE.lock
            interrupts.wait_for(lock)
            stack.callback(lock.release)
            _set_apart(stack)
            if self.seed is not None:
                _seed(self.seed)
            self.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)


def undisturbed() -> AbstractContextManager[None]:
    """Work alone with gradients enabled, on numbers, outside inference mode and autocast.

    All random generators get their states back. No other thread of the process works so meanwhile; it waits for the
    others. An interrupt rises where it leaves nothing behind, see `Orderly`.
    """
    return _Undisturbed()


def seeded(seed: int) -> AbstractContextManager[None]:
    """Work `undisturbed`, with all random generators at `seed`."""
    return _Undisturbed(int(seed))  # torch takes no integers of NumPy


def _set_apart(stack: ExitStack) -> None:
    """Enter what makes up undisturbed work."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    for context in (torch.random.fork_rng(devices), torch.inference_mode(mode=False), torch.enable_grad()):
        stack.enter_context(context)
    stack.enter_context(_uncast())
    stack.enter_context(computing())
    stack.callback(np.random.set_state, states[1])
    stack.callback(random.setstate, states[0])


def _seed(seed: int) -> None:
    """Set all random generators."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _uncast() -> Iterator[None]:
    """Leave autocast, in whose dtype nothing would be exact.

    Its cache of weights is off, which an autocast inside of this one, of a training step say, would not empty.
    """
    kinds = ("cpu", "cuda")
    before, cached = [torch.is_autocast_enabled(kind) for kind in kinds], torch.is_autocast_cache_enabled()
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)  # noqa: FBT003 - takes no names
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        for kind, enabled in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def precise() -> Iterator[None]:
    """Multiply numbers in float32 as they are.

    By default a GPU rounds those of convolutions and recurrent layers to ten bits (TF32); products of matrices are
    rounded where `torch.set_float32_matmul_precision` says so. Two models that compute the same differ by more than
    `verify` lets pass then, and a GPU differs from the CPU.
    """
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as stack:
        try:
            for_matrices, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        except RuntimeError:  # torch was told operation by operation
            for_matrices, tf32 = "highest", False
        if for_matrices != "highest":
            stack.callback(torch.set_float32_matmul_precision, for_matrices)
            torch.set_float32_matmul_precision("highest")
        if tf32:
            stack.callback(setattr, cudnn, "allow_tf32", tf32)
            cudnn.allow_tf32 = False
        for products in _rounded():
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield


def _rounded() -> list[Any]:
    """The operations of which torch was told one by one, which it can be since 2.9, to round what they multiply."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    on_cpu = backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, *on_cpu
    return [operation for operation in operations if operation.fp32_precision in ("tf32", "bf16")]


@contextmanager
def placed(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Move models to a device, None being where they are, and each back to its own afterwards."""
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
    """Run a model in eval mode: every submodule gets its own mode back, and every buffer that changes its numbers."""
    with in_eval_mode(model), kept_buffers(model):
        yield


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the numbers of buffers that a forward changes."""
    held = [(buffer, _age(buffer), buffer.clone()) for buffer in model.buffers() if has_numbers(buffer)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, age, before in held:
                if _age(buffer) is None or _age(buffer) != age:
                    buffer.copy_(before)


def _age(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, or None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        applied(model, "eval")
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # a class may refuse what it is told
                module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, or the CPU."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating dtype of the model's first parameter or buffer, or torch's default."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()
