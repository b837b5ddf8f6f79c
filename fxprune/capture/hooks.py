"""Forward hooks, and forwards set on instances: which of them compute, and so belong to the graph."""

from __future__ import annotations

import dis
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.capture.checks import Entry, check_example, is_named, runnable
from fxprune.computed import make_permanent
from fxprune.errors import CaptureError
from fxprune.example import as_call, opened
from fxprune.isolation import FORWARD_HOOKS, HOOKS, device_of, isolated_copy, restored, seeded, shape_only
from fxprune.numberless import lacking_numbers, to_home
from fxprune.overrides import changed
from fxprune.source import users_line

Hook = tuple[str, str, int]  # the path of its module, the dict of the module that it is in, and its key there
_PRE, _POST = FORWARD_HOOKS[:2]
_KINDS = {_PRE: "forward pre-hook", _POST: "forward hook"}


# -- which hooks compute -----------------------------------------------------------------------------------------------


def computing(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> frozenset[Hook]:
    """The forward hooks of a model without which it would compute something else.

    A copy is run on the example: these are the hooks that return something, change a tensor in place, or put another
    into its place; or else all, if leaving out the others changes what the model gives.

    Raises CaptureError where the model does not run, or where a hook or a forward that is set on an instance works with
    tensors of the caller's own model.
    """
    if not any(hooked(module) or _is_set(module) for module in model.modules()):
        return frozenset()
    watched = plain_copy(model)
    found, numbers = frozenset(_hooks(watched)), lacking_numbers(watched) is None
    example = to_home(example, device_of(watched))
    check_example(watched, example, concrete)
    if numbers:
        example = runnable(plain_copy(model), example, concrete)
    run = _Run(model, watched)
    try:
        before = run.outputs(example, concrete)
    except Exception:
        if numbers:
            raise
        return found  # what fails without numbers says nothing
    run.check()
    if numbers and run.computing != found:
        keep(own := plain_copy(model), run.computing)
        try:
            same = _equal(before, _outputs(own, example, concrete))
        except Exception:  # noqa: BLE001 - a forward, or a hook, that works with what another one noted
            same = False
        return frozenset(run.computing) if same else found
    return frozenset(run.computing)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, with its forward hooks; weights that hooks of torch compute are parameters."""
    own = isolated_copy(model)
    make_permanent(own)
    return own.eval()


class _Run(TorchFunctionMode):
    """A run of a copy of a model with its hooks; `computing` are the hooks that computed."""

    def __init__(self, model: nn.Module, own: nn.Module) -> None:
        super().__init__()
        self.model, self.own, self.computing = model, own, set[Hook]()
        ours = {id(tensor) for _, tensor in _tensors(own)}
        self.foreign = {id(tensor): name for name, tensor in _tensors(model) if id(tensor) not in ours}
        self.inside: list[Hook | None] = [None]
        self.uses: list[tuple[Hook | None, str, str]] = []
        for hook in _hooks(own):
            store = getattr(own.get_submodule(hook[0]), hook[1])
            store[hook[2]] = self._watched(hook, store[hook[2]])

    def outputs(self, example: Any, concrete: Mapping[str, Any]) -> list[Any]:
        """What the copy gives."""
        with self:
            return _outputs(self.own, example, concrete)

    def check(self) -> None:
        """Raise where the caller's model itself is used, but not by hooks that only look at values."""
        for hook, name, line in self.uses:
            if hook is None or hook in self.computing:
                what = "a forward set on an instance" if hook is None else described(self.own, hook)
                raise CaptureError(
                    f"{what} works with {name} of the {type(self.model).__name__} itself, which no copy of the model "
                    f"can follow ({line}): use the module that it is given, or one that it closes over"
                )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.foreign:
                self.uses.append((self.inside[-1], self.foreign[id(leaf)], " ".join(str(users_line()).split())))
        return func(*args, **(kwargs or {}))

    def _watched(self, hook: Hook, function: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that notes whether it computes."""

        @wraps(function)
        def call(module: nn.Module, *given: Any) -> Any:
            held = _held(module)
            tensors = [t for t in (*pytree.tree_leaves(given), *held.values()) if isinstance(t, Tensor)]
            ages = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
            self.inside.append(hook)
            try:
                result = function(module, *given)
            finally:
                self.inside.pop()
            same = result is None or _is_same(result, given if hook[1] == _PRE else given[-1])
            if (
                not same
                or _may_return(function)
                or any(t._version != age for t, age in ages)
                or _has_other(module, held)
            ):
                self.computing.add(hook)
            return result

        return call


def _may_return(function: Any) -> bool:
    """Whether a function returns something on some ways through it, and nothing on others."""
    calls = list(dis.get_instructions(code)) if (code := _code(function)) else []
    values = [call.argval for call in calls if call.opname == "RETURN_CONST"]
    for before, call in pairwise(calls):
        if call.opname == "RETURN_VALUE":
            constant = before.opname == "LOAD_CONST"
            values += ([before.argval] if constant else []) + ([...] if call.is_jump_target or not constant else [])
    return None in values and any(value is not None for value in values)


def _outputs(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> list[Any]:
    """What a model gives on a copy of an example; with shapes alone, where that is all it has."""
    made = torch.clone if lacking_numbers(model) is None else shape_only
    args, kwargs = as_call(pytree.tree_map_only(Tensor, made, example))
    with seeded(0), torch.no_grad():
        return pytree.tree_leaves(opened(model(*args, **kwargs, **concrete)))


def _equal(one: list[Any], other: list[Any]) -> bool:
    """Whether two outputs are equal, bit for bit."""
    pairs = list(zip(one, other, strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in tensors
    )


def _is_same(result: Any, given: Any) -> bool:
    """Whether a hook gave back the very values that it was given."""
    one, other = pytree.tree_leaves(result), pytree.tree_leaves(given)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that the modules of a model hold, by name."""
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}" if path else name, tensor) for name, tensor in _held(module).items())


def _held(module: nn.Module) -> dict[str, Any]:
    """The tensors that a module itself holds, or their symbols."""
    stores: tuple[Mapping[str, Any], ...] = (vars(module), module._parameters, module._buffers)
    return {name: value for store in stores for name, value in store.items() if isinstance(value, (Tensor, fx.Proxy))}


def _has_other(module: nn.Module, held: Mapping[str, Any]) -> bool:
    """Whether something else stands in the place of a tensor that a module held."""
    now = _held(module)
    return any(now.get(name) is not tensor for name, tensor in held.items())


# -- keeping some, and tracing them ------------------------------------------------------------------------------------


def keep(model: nn.Module, hooks: Collection[Hook]) -> None:
    """Take all forward hooks but these from a model, a copy of our own.

    transformers, which installs hooks that collect outputs once, is told that they are gone.
    """
    for hook in list(_hooks(model)):
        if hook not in hooks:
            module = model.get_submodule(hook[0])
            del getattr(module, hook[1])[hook[2]]
            vars(module).pop("_output_capturing_hooks_installed", None)


def check_whole(model: nn.Module, leaves: Sequence[Entry]) -> None:
    """Raise where a leaf holds a hook or does what its class does in a way of its own, which a node cannot say."""
    for path, module in model.named_modules():
        for name, part in module.named_modules(prefix=path) if is_named(leaves, module, path) else ():
            inside = hooked(part) and part is not module
            if inside or _is_set(part) or (part is module and type(part).__call__ is not nn.Module.__call__):
                what = "a forward hook" if inside else "a forward of its own" if _is_set(part) else "its own __call__"
                raise CaptureError(f"leaves keeps {path} whole, but {name} has {what}: let another module be the leaf")


def strip(model: nn.Module) -> None:
    """Take all hooks, and forwards set on instances, from a traced model: its graph has them now."""
    for module in model.modules():
        vars(module).pop("forward", None)
        for hooks in HOOKS:
            getattr(module, hooks, {}).clear()


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


@contextmanager
def layer_within_hooks(layer: nn.Module, node: Callable[..., Any]) -> Iterator[None]:
    """While a layer is called with its hooks, `node` stands for what it computes between them.

    A layer into which a pre-hook puts other tensors is traced into: its weights are computed in the graph.
    """
    held = _held(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if _has_other(layer, held) or len(_held(layer)) > len(held):
            return type(layer).forward(layer, *args, **kwargs)
        with restored(layer):
            strip(layer)
            return node(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _hooks(model: nn.Module) -> Iterator[Hook]:
    """All forward hooks of a model."""
    for path, module in model.named_modules():
        for store in (_PRE, _POST):
            yield from ((path, store, key) for key in getattr(module, store))


# -- what is said of them ----------------------------------------------------------------------------------------------


def _is_set(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, not that of its class."""
    return "forward" in vars(module) and changed(module, type(module)) is not None


def described(model: nn.Module, hook: Hook) -> str:
    """A hook as a user knows it: what it is, its function and where that is, and of which module."""
    path, store, key = hook
    function = getattr(model.get_submodule(path), store)[key]
    return f"the {_KINDS[store]} {_place(function)} of {path or 'the model'}"


def _place(function: Any) -> str:
    """The name of a function and the line at which it starts."""
    inner = function.func if isinstance(function, partial) else function
    name, code = getattr(inner, "__qualname__", type(inner).__name__), _code(inner)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def _code(function: Any) -> CodeType | None:
    """The code of a function, of what a partial calls, or of an object's __call__."""
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)


def told(model: nn.Module, hooks: Collection[Hook]) -> str:
    """What a model computes by beside the forwards of its classes, and the way out where that cannot be traced."""
    found = [described(model, hook) for hook in sorted(hooks)]
    for path, module in model.named_modules():
        if _is_set(module):
            found.append(f"the forward {_place(module.forward)} that is set on {path or 'the model'}")
    if not found:
        return ""
    return (
        f"\n  (what the model computes depends on {'; '.join(found)}: take off those that are not meant to be in the "
        "graph, or put what they compute into the forward of a module)"
    )
