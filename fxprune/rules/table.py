"""The table of rules: the effect of each operation on labels.

A rule is a small function `rule(ctx, *args, **kwargs)` that gets the node's arguments with a `Labels` for every
tensor, and returns the node's value in the same form; a rule for a module gets the module before its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxprune.caller.overrides import changed

Key = Callable[..., Any] | type[nn.Module] | str
Rule = Callable[..., Any]
AnyRule = TypeVar("AnyRule", bound=Rule)

RULES: dict[Key, Rule] = {}
RAGGED: set[Rule] = set()
INDEXED: set[Rule] = set()


def rule(*keys: Key) -> Callable[[AnyRule], AnyRule]:
    """Register the decorated function for functions, method names (str) and module classes.

    Raises ValueError where a key has a rule already; the message names both.
    """

    def register(function: AnyRule) -> AnyRule:
        for key in keys:
            present = RULES.get(key)
            if present not in (None, function):
                known = f"{describe(key)} has a rule already, {present}"
                raise ValueError(f"{known}: remove that one or do not add {function}")
            RULES[key] = function
        return function

    return register


def registers(table: dict[Key, AnyRule]) -> Callable[..., Callable[[AnyRule], AnyRule]]:
    """A decorator that enters functions into a table, each under several keys."""

    def under(*keys: Key) -> Callable[[AnyRule], AnyRule]:
        def register(function: AnyRule) -> AnyRule:
            table.update(dict.fromkeys(keys, function))
            return function

        return register

    return under


def takes_ragged(function: AnyRule) -> AnyRule:
    """Mark a rule for ragged planes; the slices of a plane that enters any other rule keep the same channels."""
    RAGGED.add(function)
    return function


def takes_index(function: AnyRule) -> AnyRule:
    """Mark a rule for numbers of experts; those that enter any other rule are frozen."""
    INDEXED.add(function)
    return function


def describe(key: Key) -> str:
    """The key for a message.

    >>> describe("view"), describe(nn.Conv2d)
    ('method view', 'module torch.nn.modules.conv.Conv2d')
    >>> describe(torch.ops.aten.add), describe(torch.ops.aten.add.Tensor)
    ('function torch.ops.aten.add', 'function torch.ops.aten.add.Tensor')
    """
    if isinstance(key, str):
        return f"method {key}"
    if isinstance(key, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"function torch.ops.{str(key).replace('::', '.')}"
    kind = "module" if isinstance(key, type) and issubclass(key, nn.Module) else "function"
    return f"{kind} {getattr(key, '__module__', '')}.{getattr(key, '__qualname__', getattr(key, '__name__', key))}"


def module_class(module: nn.Module) -> type[nn.Module] | None:
    """The class whose rule applies to a module: its first ancestor in the table of which it replaces no method."""
    for cls in type(module).__mro__:
        if cls in RULES and not changed(module, cls):  # type: ignore[arg-type]
            return cls
    return None


def key_of(node: fx.Node, graph: fx.GraphModule) -> Key:
    """The key of the rule of a call node, whether there is one or not."""
    if node.op != "call_module":
        return node.target
    module = graph.get_submodule(str(node.target))
    return module_class(module) or type(module)
