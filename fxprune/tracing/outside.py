"""Classes and variables outside of a model, as they were before its forward ran or was traced."""

from __future__ import annotations

import math
import operator
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager, suppress
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.meta import has_numbers
from fxprune.caller.source_lines import HOMES, is_users
from fxprune.tracing.agreement import same_value
from fxprune.tracing.value_proxies import is_symbol

_CONTAINERS = (list, dict, set, deque)
_CODE = (type, ModuleType, FunctionType, property, nn.Module)
_DEEPEST = 3  # containers inside of containers that are looked into
_LARGEST = 1 << 22  # numbers of a tensor that is put back
_INSTALLED = (*HOMES, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
_OF_MODULES = vars(nn.Module()).keys()
_MISSING = object()


@contextmanager
def outside_restored(model: nn.Module, *, symbols: bool = False) -> Iterator[Outside]:
    """Restore, at the end, values outside of a model; with `symbols`, only those that then hold symbols."""
    outside = Outside(model)
    try:
        yield outside
    finally:
        outside.restore(symbols=symbols)


class Outside:
    """The attributes of the classes of a model's modules, and the variables that their code names, as they were.

    These are variables, containers and tensors of Python modules and of enclosing functions.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[int, Any] = {}
        self.containers: list[tuple[Any, Any]] = []
        self.arrays: list[tuple[Any, Any]] = []
        self.names: list[tuple[Any, dict[str, Any]]] = []  # classes, and the variables of modules of Python
        self.used: dict[int, set[str]] = {}  # of these variables, the ones that code names
        self.visited: dict[int, set[str]] = {}  # modules of Python, and the names in them that were followed
        self.cells: list[tuple[str, str, CellType, Any]] = []
        for kind in dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__):
            self._add_class(kind)
        for module in model.modules():
            for name in [name for name in vars(module) if name not in _OF_MODULES]:
                self.add(vars(module)[name], arrays=False)

    def values(self) -> dict[str, Any]:
        """What is there now, by name, but for functions, classes and modules."""
        found = {f"{name} of {where}": cell.cell_contents for where, name, cell, _ in self.cells if cell != CellType()}
        for home, _ in self.names:
            where = home.__qualname__ if isinstance(home, type) else home.get("__name__")
            found |= {f"{where}.{name}": value for name, value in _variables(home).items() if self._is_used(home, name)}
        return {name: value for name, value in found.items() if _is_data(value)}

    def add(self, value: Any, depth: int = 0, *, arrays: bool = True) -> None:
        """Note a container, a tensor or an array, or what a function names."""
        if is_symbol(value) or id(value) in self.seen or depth > _DEEPEST:
            return
        if isinstance(value, _CONTAINERS):
            self.seen[id(value)] = value
            self.containers.append((value, _entries(value)))
            for entry in value.values() if isinstance(value, dict) else value:
                if _is_data(entry):
                    self.add(entry, depth + 1, arrays=arrays)
        elif arrays and type(value) in (Tensor, np.ndarray) and math.prod(value.shape) <= _LARGEST:
            self.seen[id(value)] = value
            self.arrays.append((value, value.detach().clone() if isinstance(value, Tensor) else value.copy()))
        elif isinstance(function := _function(value), FunctionType) and id(function) not in self.seen:
            self.seen[id(function)] = function
            if is_users(function.__code__.co_filename):
                self._add_named(function)
        elif _is_data(value) and not isinstance(value, (Tensor, np.ndarray)):
            with suppress(Exception):  # whatever a class of the user's does where it is asked
                self.add(vars(value), depth + 1, arrays=arrays)

    def _add_class(self, kind: type) -> None:
        if id(kind) not in self.seen and kind.__module__.partition(".")[0] not in ("torch", "fxprune", "builtins"):
            self.seen[id(kind)] = kind
            self.names.append((kind, dict(vars(kind))))
            for value in list(vars(kind).values()):
                self.add(value)

    def _add_named(self, function: FunctionType) -> None:
        scope, names = function.__globals__, _names(function.__code__)
        if id(scope) not in self.used:
            self.names.append((scope, dict(scope)))
        self.used.setdefault(id(scope), set()).update(names)
        for name in sorted(names & scope.keys()):
            self._add_global(scope[name], names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != CellType():  # which is empty
                self.cells.append((function.__qualname__, name, cell, cell.cell_contents))
                self.add(cell.cell_contents)

    def _add_global(self, value: Any, names: set[str]) -> None:
        """Note a variable of a Python module; of the user's own classes and modules, also what code names in them."""
        if isinstance(value, type) and _is_own(value.__module__):
            self._add_class(value)
        elif isinstance(value, ModuleType) and _is_own(value.__name__):
            known = self.visited.setdefault(id(value), set())  # modules of a package name each other
            new = names & vars(value).keys() - known
            known |= new
            for name in new:
                self._add_global(vars(value)[name], names)
        else:
            self.add(value)

    def _is_used(self, home: Any, name: str) -> bool:
        return not name.startswith("__") if isinstance(home, type) else name in self.used[id(home)]

    def restore(self, *, symbols: bool = False) -> None:
        """Put back what has changed; with `symbols`, only what holds symbols."""
        for container, old in self.containers:
            if any(map(_is_traced, now := _entries(container))) or not (symbols or _are_same(now, old)):
                _refill(container, old)
        for home, before in self.names:
            for name, value in list(_variables(home).items()):
                if value is not (old := before.get(name, _MISSING)) and (
                    _is_traced(value) or (not symbols and _is_data(value) and self._is_used(home, name))
                ):
                    _set(home, name, old)
        for _, _, cell, old in self.cells:
            if cell != CellType() and (not symbols or _is_traced(cell.cell_contents)):
                cell.cell_contents = old
        for array, old in () if symbols else self.arrays:
            if array.shape == old.shape and not _holds_same(array, old):
                with torch.no_grad():
                    array[...] = old


def _is_own(module: str) -> bool:
    """Whether a module of Python is the user's own: neither installed as a package nor Python's."""
    file = getattr(sys.modules.get(module), "__file__", None) or ("" if module == "__main__" else os.__file__)
    return not file.startswith(_INSTALLED)


def _variables(home: Any) -> Any:
    """The attributes of a class, or the variables of a module of Python."""
    return vars(home) if isinstance(home, type) else home


def _is_data(value: Any) -> bool:
    """Whether a value is neither a function, nor a class, nor a module."""
    return not isinstance(value, _CODE) and not isinstance(_function(value), FunctionType)


def _entries(container: Any) -> list[Any]:
    """The entries of a container; the keys and values of a dict."""
    return [part for item in container.items() for part in item] if isinstance(container, dict) else list(container)


def _holds_same(array: Any, old: Any) -> bool:
    """Whether a tensor or an array holds what it held, or cannot be written."""
    if isinstance(array, np.ndarray):
        return not array.flags.writeable or array.dtype.hasobject or array.tobytes() == old.tobytes()
    return array.is_inference() or not has_numbers(array) or array.layout is not torch.strided or same_value(array, old)


def _are_same(entries: list[Any], others: list[Any]) -> bool:
    return len(entries) == len(others) and all(map(operator.is_, entries, others))


def _function(value: Any) -> Any:
    """The function inside of a method, a property or a partial."""
    if isinstance(value, partial):
        return _function(value.func)
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (MethodType, staticmethod, classmethod)) else value


def _names(code: CodeType) -> set[str]:
    """The names that a function and those inside of it use."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _is_traced(value: Any) -> bool:
    """Whether a value is a symbol, or a container of some."""
    if issubclass(type(value), (set, deque)):
        return any(map(_is_traced, value))
    is_container = issubclass(type(value), (list, tuple, dict))
    return any(map(is_symbol, pytree.tree_leaves(value) if is_container else (value,)))


def _refill(container: Any, old: list[Any]) -> None:
    container.clear()
    if isinstance(container, MutableMapping):
        for key, entry in zip(old[::2], old[1::2], strict=True):
            container[key] = entry
    elif isinstance(container, MutableSet):
        container |= set(old)
    elif isinstance(container, MutableSequence):
        container.extend(old)


def _set(home: Any, name: str, old: Any) -> None:
    """Give a name of a class, or of a module of Python, its value back."""
    if isinstance(home, type):
        delattr(home, name) if old is _MISSING else setattr(home, name, old)
    elif old is _MISSING:
        del home[name]
    else:
        home[name] = old
