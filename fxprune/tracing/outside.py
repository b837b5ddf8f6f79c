"""Classes and variables outside of a traced model, cleared of the symbols that its forward leaves there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxprune.caller.source_lines import is_users
from fxprune.tracing.value_proxies import is_symbol

_CONTAINERS = (list, dict, set, deque)
_TRACED = (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_DEEPEST = 3  # containers inside of containers that are looked into
_MISSING = object()


@contextmanager
def outside_restored(model: nn.Module) -> Iterator[None]:
    """Put back what holds symbols afterwards: attributes of the classes of modules, and what the code of these names.

    The latter are the variables, lists, dicts and sets of modules of Python and of enclosing functions.
    """
    outside = _Outside()
    for kind in dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__):
        if not kind.__module__.startswith(("torch.", "fxprune.", "builtins")):
            outside.add_class(kind)
    for module in model.modules():
        for value in vars(module).values():
            outside.add(value)
    try:
        yield
    finally:
        outside.restore()


class _Outside:
    """Classes, variables and containers as they were."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.containers: list[tuple[Any, Any]] = []
        self.names: list[tuple[Any, dict[str, Any]]] = []  # classes, and the variables of modules of Python
        self.cells: list[tuple[CellType, Any]] = []

    def add_class(self, kind: type) -> None:
        """Note the attributes of a class, and what its methods name."""
        self.names.append((kind, dict(vars(kind))))
        for value in vars(kind).values():
            self.add(value)

    def add(self, value: Any, depth: int = 0) -> None:
        """Note a container, or what a function names."""
        if is_symbol(value) or id(value) in self.seen or depth > _DEEPEST:
            return
        if isinstance(value, _CONTAINERS):
            self.seen[id(value)] = value
            held = list(value.items() if isinstance(value, dict) else value)
            self.containers.append((value, held))
            for entry in value.values() if isinstance(value, dict) else value:
                if isinstance(entry, _CONTAINERS):
                    self.add(entry, depth + 1)
        elif isinstance(function := _function(value), FunctionType) and id(function) not in self.seen:
            self.seen[id(function)] = function
            if is_users(function.__code__.co_filename):
                self._add_named(function)

    def _add_named(self, function: FunctionType) -> None:
        scope = function.__globals__
        if id(scope) not in self.seen:
            self.seen[id(scope)] = scope
            self.names.append((scope, dict(scope)))
        for name in _names(function.__code__) & scope.keys():
            self.add(scope[name])
        for cell in function.__closure__ or ():
            if cell != CellType():  # which is empty
                self.cells.append((cell, cell.cell_contents))
                self.add(cell.cell_contents)

    def restore(self) -> None:
        """Put back what holds symbols."""
        for container, old in self.containers:
            if _holds_traced(container):
                _refill(container, old)
        for home, before in self.names:
            now = vars(home) if isinstance(home, type) else home
            for name, value in list(now.items()):
                if value is not (old := before.get(name, _MISSING)) and _is_traced(value):
                    _set(home, name, old)
        for cell, old in self.cells:
            if cell != CellType() and _is_traced(cell.cell_contents):
                cell.cell_contents = old


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
    """Whether a value is a symbol or a fake tensor, or a container of some."""
    if is_symbol(value) or issubclass(type(value), _TRACED):
        return True
    if issubclass(type(value), (set, deque)):
        return any(map(_is_traced, value))
    return any(
        is_symbol(leaf) or issubclass(type(leaf), _TRACED)
        for leaf in (pytree.tree_leaves(value) if issubclass(type(value), (list, tuple, dict)) else ())
    )


def _holds_traced(container: Any) -> bool:
    entries: Iterable[Any] = (*container.keys(), *container.values()) if isinstance(container, dict) else container
    return any(map(_is_traced, list(entries)))


def _refill(container: Any, old: list[Any]) -> None:
    container.clear()
    if isinstance(container, (MutableMapping, MutableSet)):
        container.update(old)  # type: ignore[union-attr]
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
