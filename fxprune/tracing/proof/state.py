"""What a forward may change: buffers and numbers of the model, what its modules hold, and what is outside of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.caller.functions import FUNCTIONS, values_used_by
from fxprune.caller.meta import has_numbers
from fxprune.tracing.agreement import agree, same_value
from fxprune.tracing.graph import plain_attributes

_PLAIN, _CONTAINERS = (bool, int, float, str, type(None)), (list, tuple, set, frozenset, deque, dict)
_CLOSED = (type, ModuleType, nn.Module, nn.Parameter)  # not looked into
_OF_MODULES = vars(nn.Module()).keys()
_DEEPEST, _MOST = 4, 64  # levels of values inside of values that are looked into, and entries of each


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """The buffers of a model and the numbers that its modules hold, by name."""
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        numbers = {name: value for name, value in plain_attributes(module).items() if isinstance(value, (int, float))}
        state |= {f"{path}.{name}" if path else name: value for name, value in numbers.items()}
    return state


def state_of(model: nn.Module, outside: Mapping[str, Any]) -> dict[str, Any]:
    """All that the modules of a model hold, and the values `outside`, by name, down to numbers, texts and tensors.

    >>> model = nn.Identity()
    >>> model.steps = {"seen": [3, 4]}
    >>> state_of(model, {})
    {'steps': '1 entries', "steps['seen']": '2 entries', "steps['seen'][0]": 3, "steps['seen'][1]": 4}
    """
    found, seen = dict[str, Any](), dict[int, Any]()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES:
                _note(value, f"{path}.{name}" if path else name, found, seen)
    for name, value in outside.items():
        _note(value, name, found, seen)
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """The names of the values of the first state that differ in the second; floats in tensors may differ slightly."""
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if a is not b and not (same_value(a, b) if type(a) in _PLAIN and type(b) in _PLAIN else agree(a, b)):
            yield name


def _note(value: Any, name: str, found: dict[str, Any], seen: dict[int, Any], depth: int = 0) -> None:
    """Put a value into `found`, by name, and what is inside of it."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, _PLAIN):
        found[name] = value
    elif id(value) not in seen and depth <= _DEEPEST and not isinstance(value, _CLOSED):
        seen[id(value)] = value
        if type(value) is Tensor and value.layout is torch.strided and has_numbers(value):
            found[name] = value.detach().clone()
        elif isinstance(value, np.ndarray):
            found[name] = None if value.dtype.hasobject else hash(value.tobytes())
        elif isinstance(value, itertools.count):
            found[name] = repr(value)
        elif isinstance(value, _CONTAINERS):
            found[name] = f"{len(value)} entries"
        for inner, entry in itertools.islice(_inside(value), _MOST):
            _note(entry, name + inner, found, seen, depth + 1)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """The values inside of a container, an object or a function, each with how it is spelled."""
    if isinstance(value, dict):
        for number, (key, entry) in enumerate(dict.items(value)):
            yield f"[{(key if isinstance(key, (str, int)) else number)!r}]", entry
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{number}]", entry) for number, entry in enumerate(value))
    elif isinstance(value, FUNCTIONS):
        yield from ((f".{name}", entry) for name, entry in values_used_by(value).items())
        if isinstance(value, MethodType):
            yield ".__self__", value.__self__
    elif not isinstance(value, (Tensor, np.ndarray)):
        with suppress(Exception):  # whatever a class of the user's does where it is asked
            yield from ((f".{name}", entry) for name, entry in getattr(value, "__dict__", {}).items())
            yield from ((f".{name}", getattr(value, name, None)) for name in getattr(type(value), "__slots__", ()))
