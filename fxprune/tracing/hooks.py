"""Forward hooks, and forwards that are set on instances: which are kept, how they are traced, and what they are."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_internals

from fxprune.caller.computed_weights import make_permanent
from fxprune.caller.isolation import FORWARD_HOOKS, HOOKS, applied, attributes_restored, isolated_copy
from fxprune.caller.overrides import changed
from fxprune.caller.source_lines import is_users, line_of, warn
from fxprune.errors import CaptureError, error_text
from fxprune.tracing.checks import Entry, is_named

Hook = tuple[str, str, int]  # the path of its module, the dict of the module that it is in, and its key there
PRE, POST = FORWARD_HOOKS[:2]
_KINDS = {PRE: "forward pre-hook", POST: "forward hook"}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, with its forward hooks; weights that torch's hooks compute are parameters."""
    own = isolated_copy(model)
    make_permanent(own)
    return applied(own, "eval")


def keep_only(model: nn.Module, hooks: Collection[Hook]) -> None:
    """Remove all forward hooks but these from a model, a copy of our own.

    So is the mark by which transformers knows that its hooks that collect outputs are installed.
    """
    for hook in list(hooks_of(model)):
        if hook not in hooks:
            module = model.get_submodule(hook[0])
            del getattr(module, hook[1])[hook[2]]
            vars(module).pop("_output_capturing_hooks_installed", None)


def check_whole(model: nn.Module, leaves: Sequence[Entry]) -> None:
    """Raise where a leaf holds a hook, a forward or a __call__ of its own, none of which a node can stand for."""
    for path, module in model.named_modules():
        for name, part in module.named_modules(prefix=path) if is_named(leaves, module, path) else ():
            what = None
            if part is not module and hooked(part):
                what = "a forward hook"
            elif has_own_forward(part):
                what = "a forward of its own"
            elif part is module and type(part).__call__ is not nn.Module.__call__:
                what = "its own __call__"
            if what:
                raise CaptureError(f"leaves keeps {path} whole, but {name} has {what}: let another module be the leaf")


def remove_hooks(model: nn.Module) -> None:
    """Remove all hooks, and forwards set on instances, from a traced model: its graph holds what they compute."""
    for module in model.modules():
        vars(module).pop("forward", None)
        for hooks in HOOKS:
            getattr(module, hooks, {}).clear()


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def held_by(module: nn.Module) -> dict[str, Any]:
    """The tensors, or their symbols, that a module itself holds."""
    held = {**vars(module), **module._parameters, **module._buffers}
    return {name: value for name, value in held.items() if isinstance(value, (Tensor, fx.Proxy))}


def holds_others(module: nn.Module, held: Mapping[str, Any]) -> bool:
    """Whether a module has other tensors under the names of those that it `held`."""
    now = held_by(module)
    return any(now.get(name) is not tensor for name, tensor in held.items())


@contextmanager
def layer_within_hooks(layer: nn.Module, node: Callable[..., Any]) -> Iterator[None]:
    """Let `node` stand for the forward of a layer that is called with its hooks.

    A layer into which a pre-hook puts other tensors is traced into: the graph computes its weights.
    """
    held = held_by(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if holds_others(layer, held) or len(held_by(layer)) > len(held):
            return type(layer).forward(layer, *args, **kwargs)
        with attributes_restored(layer):
            remove_hooks(layer)
            return node(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def hooks_of(model: nn.Module) -> Iterator[Hook]:
    """All forward hooks of a model."""
    for path, module in model.named_modules():
        for store in (PRE, POST):
            yield from ((path, store, key) for key in getattr(module, store))


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Take off the forward hooks that the process has registered for all modules; warns where there are any."""
    stores: list[Any] = [torch_internals._global_forward_hooks, torch_internals._global_forward_pre_hooks]
    before = [dict(store) for store in stores]
    if any(before):
        warn(
            "forward hooks that are registered for all modules are not part of the graph: they run on it, as on any "
            "module, while they are registered"
        )
    try:
        for store in stores:
            store.clear()
        yield
    finally:
        for store, hooks in zip(stores, before, strict=True):
            store.clear()
            store.update(hooks)


# -- in words ----------------------------------------------------------------------------------------------------------


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, not that of its class."""
    return "forward" in vars(module) and changed(module, type(module)) is not None


def described(model: nn.Module, hook: Hook) -> str:
    """A hook by its kind, its function with its line, and its module."""
    path, store, key = hook
    function = getattr(model.get_submodule(path), store)[key]
    return f"the {_KINDS[store]} {_place(function)} of {path or 'the model'}"


def failed_in_hook(model: nn.Module, error: BaseException) -> CaptureError | None:
    """The error of a model in one of whose hooks `error` was raised; None where it came from elsewhere."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    for hook in hooks_of(model):
        code = code_of(getattr(model.get_submodule(hook[0]), hook[1])[hook[2]])
        if code is not None and code in codes and is_users(code.co_filename):
            return CaptureError(
                f"{type(model).__name__} does not run, because {described(model, hook)} fails ({error_text(error)}, at "
                f"{line_of(error)}): mend the hook, or take it off"
            )
    return None


def _place(function: Any) -> str:
    """The name of a function and the line at which it starts."""
    inner, code = function.func if isinstance(function, partial) else function, code_of(function)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def code_of(function: Any) -> CodeType | None:
    """The code of a function, of what a partial calls, or of an object's __call__."""
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)


def hooks_in_words(model: nn.Module, hooks: Collection[Hook]) -> str:
    """The hooks, and the forwards set on instances, that a model computes by, and what to do where they fail."""
    found = [described(model, hook) for hook in sorted(hooks)]
    for path, module in model.named_modules():
        if has_own_forward(module):
            found.append(f"the forward {_place(module.forward)} that is set on {path or 'the model'}")
    if not found:
        return ""
    return (
        f"\n  (what the model computes depends on {'; '.join(found)}: take off those that are not meant to be in the "
        "graph, or put what they compute into the forward of a module)"
    )
