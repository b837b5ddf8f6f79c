"""Copies of functions, with all that they hold: what they close over, their defaults, and the data they name."""

from __future__ import annotations

import copy
import dis
import sys
from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FUNCTIONS = (FunctionType, MethodType, partial)
_DATA = (list, dict, set, bytearray, Tensor, nn.Module)  # what a function may change or compute with


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of something that can be called; `memo` is that of `copy.deepcopy`, and is extended.

    Unlike `copy.deepcopy`, it does not share functions: one that closes over a module of which `memo` has a copy works
    with that copy, and a list that it appends to is a copy. What cannot be copied (a lock, a file) is shared.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        owner, function = copied(value.__self__, memo), value.__func__
        own = getattr(type(value.__self__), value.__name__, None) is function
        return MethodType(function if own else copied(function, memo), owner)
    if isinstance(value, partial):
        arguments = [copied(argument, memo) for argument in value.args]
        named = {name: copied(argument, memo) for name, argument in value.keywords.items()}
        return partial(copied(value.func, memo), *arguments, **named)
    return _function(value, memo) if isinstance(value, FunctionType) else _value(value, memo)


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The same code with copies of its cells, of its defaults, and of the data that it names in its module."""
    scope, calls = function.__globals__, list(_instructions(function.__code__))
    named = {call.argval: scope[call.argval] for call in calls if "GLOBAL" in call.opname and call.argval in scope}
    data = {name: copied(value, memo) for name, value in named.items() if isinstance(value, _DATA)}
    if data or any(call.opname == "STORE_GLOBAL" for call in calls):
        scope = scope | data
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, scope, function.__name__, None, cells or None)
    memo[id(function)] = new  # before what it holds: it may hold itself
    new.__kwdefaults__ = function.__kwdefaults__ and {n: held_copy(v, memo) for n, v in function.__kwdefaults__.items()}
    new.__defaults__ = function.__defaults__ and tuple(held_copy(value, memo) for value in function.__defaults__)
    vars(new).update(vars(function))
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        if old != CellType():  # which is empty
            cell.cell_contents = held_copy(old.cell_contents, memo)
    return new


def held_copy(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a function holds; a function that its module has under its name is nobody's own."""
    home = sys.modules.get(getattr(value, "__module__", None) or "")
    shared = isinstance(value, FunctionType) and getattr(home, value.__name__, None) is value
    return value if shared else copied(value, memo)


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of those inside of it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of any value, or the value where it cannot be copied."""
    try:
        with _Detached():
            return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises that cannot be copied
        return value


class _Detached(TorchFunctionMode):
    """Copies of tensors that were computed are made without the graph of their gradients, which has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        return args[1].setdefault(id(args[0]), args[0].detach().clone())
