"""Copies of functions, with copies of their closures, defaults and the global data that they use."""

from __future__ import annotations

import copy
import dis
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FUNCTIONS = (FunctionType, MethodType, partial)
_PLAIN = (bool, int, float, str, type(None), type)
_DATA = (list, dict, set, bytearray, Tensor, nn.Module, partial)  # a function may change them or compute with them


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a callable; `memo` is that of `copy.deepcopy`, and is extended.

    Unlike `copy.deepcopy`, it copies functions: the copy uses the copies in `memo` of the modules in its closure, and
    copies of the lists that it appends to. Objects that cannot be copied (a lock, a file) are shared, and a compiled
    function is copied as it was before.
    """
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        owner, function = copied(value.__self__, memo), value.__func__
        own = getattr(type(value.__self__), value.__name__, None) is function
        return MethodType(function if own else copied(function, memo), owner)
    if isinstance(value, partial):
        arguments = [copied(argument, memo) for argument in value.args]
        new = partial(copied(value.func, memo), *arguments, **_each(value.keywords, memo))
        vars(new).update(vars(value))
        return new
    return _function(value, memo) if isinstance(value, FunctionType) else _value(value, memo)


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The same code with copies of its cells, its defaults, and the global data that it uses."""
    scope, data = function.__globals__, _data(function)
    defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
    writes = any(call.opname == "STORE_GLOBAL" for call in _instructions(function.__code__))
    holds = data or writes or function.__closure__ or not all(isinstance(value, _PLAIN) for value in defaults)
    if not holds or (_is_named(function) and function.__module__.startswith("torch")):
        return function  # the rules of torch's operations are found by the function
    if data or writes:
        scope = memo.setdefault(id(scope), dict(scope))  # shared by all functions of the module
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, scope, function.__name__, None, cells or None)
    memo[id(function)] = new  # before its cells, which may hold the function itself
    scope.update(_each(data, memo))
    new.__kwdefaults__ = function.__kwdefaults__ and _each(function.__kwdefaults__, memo)
    new.__defaults__ = function.__defaults__ and tuple(held_copy(value, memo) for value in function.__defaults__)
    vars(new).update(vars(function))
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        if old != CellType():  # an empty cell
            cell.cell_contents = held_copy(old.cell_contents, memo)
    return new


def _each(values: Mapping[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {name: held_copy(value, memo) for name, value in values.items()}


def values_used_by(value: Any) -> dict[str, Any]:
    """The closure of a callable and the global data that it uses, by name."""
    if isinstance(value, (MethodType, partial)):
        return values_used_by(value.__func__ if isinstance(value, MethodType) else value.func)
    if not isinstance(value, FunctionType):
        return {}
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    return _data(value) | {name: cell.cell_contents for name, cell in cells if cell != CellType()}


def _data(function: FunctionType) -> dict[str, Any]:
    """The global data that a function uses."""
    scope = function.__globals__
    names = {call.argval for call in _instructions(function.__code__) if "GLOBAL" in call.opname}
    return {name: scope[name] for name in sorted(names & scope.keys()) if _is_data(scope[name])}


def _is_data(value: Any) -> bool:
    """Whether a function may compute with a global value or change it: data, methods of modules, unnamed functions."""
    if isinstance(value, MethodType):
        return isinstance(value.__self__, nn.Module)
    return isinstance(value, _DATA) or (isinstance(value, FunctionType) and not _is_named(value))


def held_copy(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a value that a function holds; a function that its module has under its name is shared."""
    return value if isinstance(value, FunctionType) and _is_named(value) else copied(value, memo)


def _is_named(function: FunctionType) -> bool:
    """Whether a module has a function under its name."""
    return getattr(sys.modules.get(function.__module__ or ""), function.__name__, None) is function


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of the functions that it defines."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of any value, which shares the parts that cannot be copied."""
    known = set(memo)
    try:
        with _Detached():
            return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - a user's class that cannot be copied raises anything
        for half_made in memo.keys() - known - {id(memo)}:
            del memo[half_made]
    try:
        new = memo[id(value)] = copy.copy(value)
        if isinstance(value, list):
            new[:] = [held_copy(item, memo) for item in value]
        else:
            held = new if isinstance(value, dict) else vars(new)
            held.update(_each(held, memo))
    except Exception:  # noqa: BLE001 - the same
        memo[id(value)] = new = value
    return new


class _Detached(TorchFunctionMode):
    """Copies computed tensors without their gradient graph, which cannot be copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        return args[1].setdefault(id(args[0]), args[0].detach().clone())
