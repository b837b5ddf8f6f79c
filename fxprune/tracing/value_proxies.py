"""The symbols of nodes while a forward is traced: without values, or with the values of the example."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.caller.source_lines import deciding_line, is_users, users_frame

_PLAIN = (type(None), str, bytes, type, torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
_MISSING = object()
_OWN = frozenset({"node", "tracer", "concrete", "_call"})  # what a tensor's symbol has itself
_WRITES = frozenset({"update", "setdefault", "pop", "popitem", "clear"})  # methods by which a dict changes
_OF_AUTOGRAD = frozenset({"grad", "grad_fn", "requires_grad", "is_leaf", "retains_grad", "output_nr"})


class _Unknown:
    """What a symbol without a value cannot answer: the tracer stops, and says what it was asked."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        if _asked_by_user():
            self.tracer.refuse("the forward asks for the type of a value")
        return type(self)

    def __getattr__(self, k: str) -> Any:
        if not k.startswith("__") and (k in _OF_AUTOGRAD or not hasattr(Tensor, k)):
            self.tracer.refuse(f"the forward asks a value for {k!r}")
        return SymbolAttribute(self, k)  # type: ignore[arg-type]

    def __len__(self) -> Any:
        return self.tracer.refuse("the forward asks for the length of a value")

    def __int__(self) -> Any:
        return self.tracer.refuse("the forward makes an int of a value")

    def __float__(self) -> Any:
        return self.tracer.refuse("the forward makes a float of a value")

    def __hash__(self) -> int:
        if _asked_by_user():
            self.tracer.refuse("the forward looks a value up by its hash")
        return id(self)

    def __str__(self) -> str:
        return self._told("", fx.Proxy.__str__)

    def __repr__(self) -> str:
        return self._told("", fx.Proxy.__repr__)

    def __format__(self, spec: str) -> str:
        return self._told(spec, fx.Proxy.__str__)

    def _told(self, spec: str, text: Callable[[Any], str]) -> str:
        """The text of a symbol. The user's code gets it only for the message of an assertion or an error."""
        if _asked_by_user(3) and (frame := users_frame()) is not None and deciding_line(frame):
            self.tracer.refuse("the forward makes a text of a value")
        return format(text(self), spec)


class Symbol(_Unknown, fx.Proxy):
    """A symbol of symbolic tracing, whose value is unknown."""

    def __iter__(self) -> Iterator[Any]:
        """The entries where Python unpacks them into names: the tracer notes how many there are."""
        frame = sys._getframe(1)
        done, count = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if dis.opname[done] != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)  # type: ignore[no-any-return]
        self.tracer.unpacked(self.node, count)
        return iter([self[i] for i in range(count)])  # type: ignore[index]


class SymbolAttribute(_Unknown, fx.proxy.Attribute):  # type: ignore[misc]
    """An attribute of such a symbol, or a method before it is called."""


def _asked_by_user(depth: int = 2) -> bool:
    """Whether the user's code called the caller of this, directly or through a frozen part of Python (abc)."""
    frame = sys._getframe(depth)
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen"):
        frame = frame.f_back
    return is_users(frame.f_code.co_filename)


def _caches_called(frame: types.FrameType) -> list[functools._lru_cache_wrapper[Any]]:
    """The cached functions that a frame may be calling: those that its code names, bare or as an attribute."""
    code = frame.f_code
    if not dis.opname[code.co_code[frame.f_lasti]].startswith("CALL"):
        return []
    names, known = (*code.co_names, *code.co_varnames, *code.co_freevars), frame.f_globals | frame.f_locals
    bare = [known[name] for name in names if name in known]
    homes = [value if isinstance(value, (type, types.ModuleType)) else type(value) for value in bare]
    found = bare + [inspect.getattr_static(home, name, None) for home in homes for name in code.co_names]
    return [value for value in found if isinstance(value, functools._lru_cache_wrapper)]


if TYPE_CHECKING:
    _Recording = fx.Proxy
else:  # without __call__, which would make every value callable
    _LEFT_OUT = ("__call__", "__dict__", "__weakref__", "__class_getitem__")
    _Recording = type("_Recording", (), {k: v for k, v in vars(fx.Proxy).items() if k not in _LEFT_OUT})


@functools.cache
def _also_proxy(kind: type) -> type:
    """A class that is `kind` and a proxy; `kind` itself where no class can be derived from it."""
    try:
        return types.new_class(kind.__name__, (kind, fx.Proxy))
    except TypeError:
        return kind


class ValueProxy(_Recording):
    """A symbol that answers with its value wherever Python needs a number, and records all else as nodes.

    It is an instance of the value's class, so that type checks of the user hold, and of a proxy's class, by which
    libraries know that they are traced and must not decide by values.
    """

    tracer: Any

    def __init__(self, node: fx.Node, tracer: Any, concrete: Any) -> None:
        self.concrete, self.node, self.tracer = concrete, node, tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return _also_proxy(type(self.concrete))  # type: ignore[arg-type]

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
            self.tracer.length(self)
            return iter(list(self.concrete))
        entries = self.tracer.entries(self)
        if entries is not None:
            return iter(entries)
        return iter([self[i] for i in range(self.tracer.length(self))])  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._call(operator.setitem, key, value)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.concrete, Tensor):
            return bool(self._call(operator.eq, item).any())
        return item in self.tracer.fixed(self)

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.fixed(self))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __round__(self, ndigits: int | None = None) -> Any:
        return self._call(round) if ndigits is None else self._call(round, ndigits)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.fixed(self), spec)

    def __str__(self) -> str:
        return str(self.tracer.fixed(self))

    def __repr__(self) -> str:
        return repr(self.tracer.fixed(self)) if _asked_by_user() else fx.Proxy.__repr__(self)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        """The value's; numbers and shapes have none, because as keys of a cache they would outlive the trace.

        Where the caller calls a cached function, that is run on the symbol, and the tracer empties the cache.
        """
        if isinstance(self.concrete, (int, float, tuple)):
            if not (caches := _caches_called(sys._getframe(1))):
                raise TypeError(f"unhashable while it is traced: {type(self.concrete).__name__}")
            self.tracer.caches.update(dict.fromkeys(caches))
        elif not isinstance(self.concrete, Tensor):
            return hash(self.concrete)
        return id(self)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


class SequenceProxy(ValueProxy):
    """The symbol of a tuple or list, for `match`."""


for _kind in (SequenceProxy, Symbol, SymbolAttribute):
    Sequence.register(_kind)  # a symbol without a value is asked for its length by `match`, and refuses


class MappingProxy(ValueProxy):
    """The symbol of a dict. Once the forward has written into it, it is a dict of symbols: `written`."""

    written: dict[Any, Any] | None = None

    def _opened(self) -> dict[Any, Any]:
        if self.written is None:
            self.written = {key: self[key] for key in self.concrete}
        return self.written

    def __getitem__(self, key: Any) -> Any:
        return self._call(operator.getitem, key) if self.written is None else self.written[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._opened()[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._opened()[key]

    def __getattr__(self, k: str) -> Any:
        if k in _WRITES or (self.written is not None and callable(getattr(dict, k, None))):
            return getattr(self._opened(), k)
        return super().__getattr__(k)

    def keys(self) -> Any:
        """Those of the dict; a proxy has such a method of its own."""
        return super().keys() if self.written is None else self.written.keys()

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.written is None else iter(self.written)

    def __contains__(self, item: Any) -> bool:
        return super().__contains__(item) if self.written is None else item in self.written

    def __len__(self) -> int:
        return super().__len__() if self.written is None else len(self.written)


class TensorProxy(ValueProxy, Tensor):  # type: ignore[misc]
    """The symbol of a tensor. It is a tensor itself, because torch's parser of arguments looks into its arguments."""

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
    if isinstance(value, Tensor):
        return TensorProxy.of(node, tracer, value)
    kinds = ((dict, MappingProxy), ((tuple, list), SequenceProxy), (object, ValueProxy))
    return next(proxy for kind, proxy in kinds if isinstance(value, kind))(node, tracer, value)  # type: ignore[arg-type]


def _in_place(name: str) -> Callable[[ValueProxy, Any], Any]:
    """The method of an augmented assignment: it changes a tensor in place, and makes a new value of anything else."""

    def method(self: ValueProxy, other: Any) -> Any:
        kind = "i" if isinstance(self.concrete, Tensor) else ""
        return self._call(getattr(operator, f"__{kind}{name}__"), other)

    return method


def _number(kind: Callable[[Any], Any]) -> Callable[[ValueProxy], Any]:
    """The method by which Python makes a number of a value: the tracer notes that the graph holds it fixed."""
    return lambda self: kind(self.tracer.fixed(self))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(ValueProxy, f"__i{_name}__", _in_place(_name))
for _number_kind in (bool, int, float, complex):
    setattr(ValueProxy, f"__{_number_kind.__name__}__", _number(_number_kind))


def is_symbol(value: Any) -> bool:
    """Whether a value stands for a node."""
    return issubclass(type(value), (fx.Proxy, ValueProxy))


def is_plain(value: Any) -> bool:
    """Whether the user's code gets a value itself: it depends neither on the batch nor on the device."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(is_plain(entry) for entry in value)
    return isinstance(value, (bool, *_PLAIN))
