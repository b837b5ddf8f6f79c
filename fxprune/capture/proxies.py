"""The symbols of the second way to a graph: each stands for a node and knows the node's value on the example."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_PLAIN = (type(None), str, bytes, type, torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
_MISSING = object()
_OWN = frozenset({"node", "tracer", "concrete", "_call"})  # what a tensor's symbol has itself


class ValueProxy(fx.Proxy):
    """A symbol that answers with its value wherever Python needs a real number, and is recorded elsewhere.

    Its class is that of the value, so that checks of types in the user's code go right.
    """

    tracer: Any

    def __init__(self, node: fx.Node, tracer: Any, concrete: Any) -> None:
        self.concrete = concrete
        super().__init__(node, tracer)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.concrete)

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__") and k.endswith("__"):
            raise AttributeError(k)
        if k == "ndim":
            return self.concrete.ndim
        found = getattr(type(self.concrete), k, _MISSING)
        if callable(found):
            return lambda *args, **kwargs: self.tracer.method(self, k, args, kwargs)
        if found is _MISSING:
            getattr(self.concrete, k)  # raises what the value raises
        return self._call(getattr, k)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.concrete, Mapping):
            return iter(list(self.concrete))
        return iter([self[i] for i in range(len(self.concrete))])  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._call(operator.setitem, key, value)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.concrete, Tensor):
            return bool(self._call(operator.eq, item).any())
        return item in self.tracer.fixed(self)

    def __len__(self) -> int:
        return len(self.concrete)

    def __bool__(self) -> bool:
        return bool(self.tracer.fixed(self))

    def __int__(self) -> int:
        return int(self.tracer.fixed(self))

    def __float__(self) -> float:
        return float(self.tracer.fixed(self))

    def __complex__(self) -> complex:
        return complex(self.tracer.fixed(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.fixed(self))

    def __round__(self, ndigits: int | None = None) -> Any:
        return self._call(round) if ndigits is None else self._call(round, ndigits)

    def __format__(self, spec: str) -> str:
        return format(self.concrete, spec)

    def __str__(self) -> str:
        return str(self.concrete)

    def __hash__(self) -> int:
        """As the value's, but numbers and shapes have none: as keys of a cache they would outlive the trace."""
        if isinstance(self.concrete, (int, float, tuple)):
            raise TypeError(f"unhashable while it is traced: {type(self.concrete).__name__}")
        return id(self) if isinstance(self.concrete, Tensor) else hash(self.concrete)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


class TensorProxy(ValueProxy, Tensor):  # type: ignore[misc]
    """The symbol of a tensor. It is a tensor, too: torch's parser of arguments looks into what calls itself one."""

    @staticmethod
    def of(node: fx.Node, tracer: Any, concrete: Tensor) -> Any:
        """The symbol of a node whose value is a tensor."""
        proxy: Any = Tensor._make_subclass(TensorProxy, concrete.detach())
        proxy.__dict__.update(node=node, tracer=tracer, concrete=concrete)
        return proxy

    def __getattribute__(self, k: str) -> Any:
        if k in _OWN or (k.startswith("__") and k.endswith("__")):
            return object.__getattribute__(self, k)
        return ValueProxy.__getattr__(self, k)


def proxy_of(node: fx.Node, tracer: Any, value: Any) -> Any:
    """The symbol of a node that has this value."""
    return TensorProxy.of(node, tracer, value) if isinstance(value, Tensor) else ValueProxy(node, tracer, value)


def _in_place(name: str) -> Callable[[ValueProxy, Any], Any]:
    """The method of an augmented assignment: it changes a tensor in place, and makes a new value of all else."""

    def method(self: ValueProxy, other: Any) -> Any:
        prefix = "i" if isinstance(self.concrete, Tensor) else ""
        return self._call(
            getattr(operator, f"{prefix}{name}{'_' if name in ('and', 'or') and not prefix else ''}"), other
        )

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(ValueProxy, f"__i{_name}__", _in_place(_name))


def is_plain(value: Any) -> bool:
    """Whether a value goes into the user's code as it is: it depends neither on the batch nor on the device."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(is_plain(entry) for entry in value)
    return isinstance(value, (bool, *_PLAIN))
