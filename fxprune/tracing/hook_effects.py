"""Which forward hooks of a model compute, and so belong to its graph; the others only observe."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial, wraps
from itertools import pairwise
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call, as_fields
from fxprune.caller.functions import values_used_by
from fxprune.caller.isolation import seeded
from fxprune.caller.meta import lacking_numbers
from fxprune.caller.meta_calls import shape_only
from fxprune.caller.source_lines import is_users, users_line
from fxprune.errors import CaptureError
from fxprune.tracing.checks import does_not_run
from fxprune.tracing.hooks import (
    PRE,
    Hook,
    code_of,
    described,
    has_own_forward,
    held_by,
    holds_others,
    hooked,
    hooks_of,
    keep_only,
    plain_copy,
)
from fxprune.tracing.in_place import ABOUT_GRADIENTS

_DEEPEST = 3  # functions that a hook calls, and those call, that are looked into


def computing_hooks(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> frozenset[Hook]:
    """The forward hooks of a model without which it would compute something else, by a run of a copy on the example.

    These are the hooks that return something, change a tensor in place, or replace one; or all of them, if the outputs
    change without the others.

    Raises CaptureError where the model does not run, or where a hook or a forward that is set on an instance works with
    tensors of the caller's own model.
    """
    if not any(hooked(module) or has_own_forward(module) for module in model.modules()):
        return frozenset()
    run, numbers = _WatchedRun(model), lacking_numbers(model) is None
    found = frozenset(hooks_of(run.own))
    try:
        before = run.outputs(example, concrete)
    except Exception as error:
        if numbers:
            raise does_not_run(model, error) from error
        return found  # without numbers, a failure does not tell which hooks compute
    run.check()
    if numbers and run.computing != found:
        keep_only(own := plain_copy(model), run.computing)
        try:
            same = _equal(before, _outputs(own, example, concrete))
        except Exception:  # noqa: BLE001 - a forward, or a hook, that needs what another hook noted
            same = False
        return frozenset(run.computing) if same else found
    return frozenset(run.computing)


class _WatchedRun(TorchFunctionMode):
    """A run of a copy of a model with its hooks.

    `computing` are the hooks that computed. `inside` are those that run at the moment, after None for the forward.
    `uses` says which of them worked with tensors of the caller's, and at which line.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.own, self.computing = model, plain_copy(model), set[Hook]()
        self.foreign = _foreign(model, self.own)
        self.inside: list[Hook | None] = [None]
        self.uses: list[tuple[Hook | None, str, str]] = []
        for hook in list(hooks_of(self.own)):
            store = getattr(self.own.get_submodule(hook[0]), hook[1])
            store[hook[2]] = self._watched(hook, store[hook[2]])

    def outputs(self, example: Any, concrete: Mapping[str, Any]) -> Any:
        """The outputs of the copy."""
        with self:
            return _outputs(self.own, example, concrete)

    def check(self) -> None:
        """Raise where the forward, or a hook that computes, works with what belongs to the caller."""
        for hook, name, line in self.uses:
            if hook is None or hook in self.computing:
                who = "a forward" if hook is None else described(self.model, hook)
                raise CaptureError(
                    f"{who} works with {name}, which no copy of the model can follow ({line}): "
                    "use the module that it is given, or what it closes over"
                )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.foreign:
                self.uses.append((self.inside[-1], self.foreign[id(leaf)], " ".join(str(users_line()).split())))
        return func(*args, **(kwargs or {}))

    def _watched(self, hook: Hook, function: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that is noted where it computes."""

        @wraps(function)
        def call(module: nn.Module, *given: Any) -> Any:
            held = held_by(module)
            tensors = [t for t in (*pytree.tree_leaves(given), *held.values()) if isinstance(t, Tensor)]
            ages = [(tensor, tensor._version) for tensor in tensors if not (is_lazy(tensor) or tensor.is_inference())]
            self.inside.append(hook)
            try:
                result = function(module, *given)
            finally:
                self.inside.pop()
            before = given if len(given) > 1 and hook[1] == PRE else given[0 if hook[1] == PRE else -1]
            changed = any(tensor._version != age for tensor, age in ages) or holds_others(module, held)
            may = _may_return(function) or _may_write(function) or (result is not None and _branches(code_of(function)))
            if changed or may or not _is_same(result, before):
                self.computing.add(hook)
            return result

        return call


def _may_return(function: Any, depth: int = _DEEPEST) -> bool:
    """Whether a function, or one whose result it returns, returns something on some paths, and nothing on others."""
    calls = list(dis.get_instructions(code)) if (code := code_of(function)) else []
    values = [call.argval for call in calls if call.opname == "RETURN_CONST"]
    for before, call in pairwise(calls):
        if call.opname == "RETURN_VALUE":
            constant = before.opname == "LOAD_CONST"
            values += ([before.argval] if constant else []) + ([...] if call.is_jump_target or not constant else [])
    if None in values and any(value is not None for value in values):
        return True
    returns = [node for node in ast.walk(_source(code)) if isinstance(node, (ast.Return, ast.Lambda))] if depth else []
    results = (node.value if isinstance(node, ast.Return) else node.body for node in returns)
    called = (_called(result, function) for result in results if isinstance(result, ast.Call))
    return any(_may_return(inner, depth - 1) for inner in called if inner is not None)


def _branches(code: CodeType | None) -> bool:
    """Whether not every run of a function goes the same way."""
    return any(
        "JUMP" in call.opname or "FOR_ITER" in call.opname for call in (dis.get_instructions(code) if code else ())
    )


_LITERALS = (ast.Constant, ast.Dict, ast.List, ast.Set, ast.DictComp)


def _may_write(
    function: Any, among: Collection[str] | None = None, *, branched: bool = False, depth: int = _DEEPEST
) -> bool:
    """Whether a function, or one that it calls, may change its arguments in place on a path that a run need not take.

    `among` are the parameters that are given a hook's arguments, by default all; `branched` says that a run need not
    come to the function.
    """
    code = code_of(function)
    if code is None:
        return False
    branched |= _branches(code)
    nodes = list(ast.walk(_source(code)))
    if len(nodes) == 1:  # of a module without statements
        return branched and any(map(_is_in_place, code.co_names))
    made = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, _LITERALS)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    given = set(code.co_varnames) - made - {_own_name(function)}
    if among is not None:
        given -= set(_parameters(code)) - set(among)
    if branched and any(_root(target) in given for node in nodes for target in _written_in(node)):
        return True
    for call in (node for node in nodes if isinstance(node, ast.Call) and depth):
        called = _called(call, function)
        handed = () if called is None else _handed(call, called, given)
        if handed and _may_write(called, handed, branched=branched, depth=depth - 1):
            return True
    return False


def _source(code: CodeType | None) -> ast.Module:
    """The source of a function; no statements where it cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)) if code else "")
    except (OSError, SyntaxError):
        return ast.parse("")


def _opened(function: Any) -> tuple[Any, Any]:
    """What a callable runs, and the object that this is a method of, or None."""
    if isinstance(function, partial):
        return _opened(function.func)
    if isinstance(function, MethodType):
        return function.__func__, function.__self__
    return (function, None) if isinstance(function, FunctionType) else (type(function).__call__, function)


def _own_name(function: Any) -> str | None:
    """What a method calls its object; None for other functions."""
    inner, owner = _opened(function)
    names = inner.__code__.co_varnames if isinstance(inner, FunctionType) else ()
    return names[0] if owner is not None and names else None


def _parameters(code: CodeType) -> tuple[str, ...]:
    flags = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + flags]


def _called(call: ast.Call, function: Any) -> Any:
    """The user's function that a call in the source of a function calls, or None."""
    called = _value(call.func, function)
    inner = _opened(called)[0]
    return called if isinstance(inner, FunctionType) and is_users(inner.__code__.co_filename) else None


def _value(expression: ast.expr, function: Any) -> Any:
    """What a name, or an attribute of one, stands for in a function, or None; nothing of the user's is run."""
    inner, owner = _opened(function)
    if isinstance(expression, ast.Name) and isinstance(inner, FunctionType):
        if owner is not None and expression.id == _own_name(function):
            return owner
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        cell = cells.get(expression.id, CellType())
        return cell.cell_contents if cell != CellType() else inner.__globals__.get(expression.id)
    if not isinstance(expression, ast.Attribute) or (home := _value(expression.value, function)) is None:
        return None
    found = inspect.getattr_static(home, expression.attr, None)
    if isinstance(found, (staticmethod, classmethod)):
        return found.__func__
    is_method = isinstance(found, FunctionType) and expression.attr not in getattr(home, "__dict__", {})
    return MethodType(found, home) if is_method else found


def _handed(call: ast.Call, called: Any, given: Collection[str]) -> set[str]:
    """The parameters of a function to which a call passes values that are computed from the `given` variables."""
    code = _opened(called)[0].__code__
    names = [name for name in _parameters(code) if name != _own_name(called)]
    if isinstance(called, partial) or any(isinstance(arg, ast.Starred) for arg in call.args):
        return set(names)
    pairs = [*zip(names, call.args), *((word.arg, word.value) for word in call.keywords)]  # noqa: B905 - as far as both
    return {
        name or names[-1]
        for name, value in pairs
        if any(isinstance(node, ast.Name) and node.id in given for node in ast.walk(value))
    }


def _written_in(node: ast.AST) -> Iterator[ast.expr]:
    """The tensors that a piece of source may work on in place."""
    if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Attribute):
        yield node.target
    if isinstance(node, ast.Assign):
        yield from (t for t in node.targets if isinstance(t, ast.Subscript) and not _is_text(t.slice))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and _is_in_place(node.func.attr):
            yield from (node.func.value, *node.args[:1])
        for keyword in node.keywords:
            if keyword.arg in ("out", "inplace"):
                yield from (keyword.value, *node.args[:1])


def _is_text(key: ast.expr) -> bool:
    return isinstance(key, ast.JoinedStr) or (isinstance(key, ast.Constant) and isinstance(key.value, str))


def _is_in_place(name: str) -> bool:
    """Whether a method of tensors, or a function of torch, of this name works in place."""
    return name.endswith("_") and not name.endswith("__") and name not in ABOUT_GRADIENTS and hasattr(Tensor, name)


def _root(target: ast.expr) -> str | None:
    """The variable that an expression starts from."""
    while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
        target = target.func if isinstance(target, ast.Call) else target.value
    return target.id if isinstance(target, ast.Name) else None


def _outputs(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> Any:
    """The outputs of a model on a copy of an example, which has shapes only where the model has."""
    copied = torch.clone if lacking_numbers(model) is None else shape_only
    args, kwargs = as_call(pytree.tree_map_only(Tensor, copied, example))
    with seeded(0), torch.no_grad():
        return as_fields(model(*args, **kwargs, **concrete))


def _equal(one: Any, other: Any) -> bool:
    """Whether two outputs are equal, bit for bit."""
    (leaves, kind), (others, other_kind) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return kind == other_kind and all(map(_same_bits, leaves, others))


def _same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and bool(((one == other) | ((one != one) & (other != other))).all())


def _is_same(result: Any, given: Any) -> bool:
    """Whether a hook returned nothing, or the very values that it was given."""
    (leaves, kind), (others, other_kind) = pytree.tree_flatten(result), pytree.tree_flatten(given)
    same = kind == other_kind and all(a is b for a, b in zip(leaves, others, strict=True))
    return result is None or same


def _foreign(model: nn.Module, own: nn.Module) -> dict[int, str]:
    """By id, the tensors that a copy must not work with: the model's, and those in lists and dicts of its hooks."""
    ours = {id(tensor) for _, tensor in _tensors(own)}
    found = {id(t): f"{name} of the {type(model).__name__} itself" for name, t in _tensors(model) if id(t) not in ours}
    functions = [module.forward for module in model.modules() if has_own_forward(module)]
    functions += [getattr(model.get_submodule(path), store)[key] for path, store, key in hooks_of(model)]
    for name, value in (item for function in functions for item in values_used_by(function).items()):
        if isinstance(value, (list, dict)):
            found |= {id(leaf): f"a tensor in {name}" for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that the modules of a model hold, by name."""
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}" if path else name, tensor) for name, tensor in held_by(module).items())
