"""The second way to a graph: symbolic tracing in which every symbol knows its value on the example."""

from __future__ import annotations

import builtins
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.caller.meta import CPU
from fxprune.caller.meta_calls import call_on_meta, method
from fxprune.caller.source_lines import deciding_line, users_frame, warn
from fxprune.tracing import symbolic
from fxprune.tracing.checks import Entry
from fxprune.tracing.choices import Choices
from fxprune.tracing.dependence import MAKING, PIECES, Dependence, name_of, tensors_of
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, must_be
from fxprune.tracing.in_place import is_in_place
from fxprune.tracing.value_proxies import TensorProxy, ValueProxy, is_plain, is_symbol, proxy_of

_REPLACED = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "tensor")  # modes see some calls only
_ON_TYPES = ("finfo", "iinfo")  # of dtypes, of which modes see none
_CHECKS = ("_check_with", "_check_tensor_all_with")  # assertions of torch, which insist on a plain bool
_LENGTH = builtins.len
_DECISIONS = 4096  # that are noted of one trace
_REPLAYED: ContextVar[tuple[Any, ...]] = ContextVar("decisions of an earlier trace", default=())

fx.node.has_side_effect(operator.setitem)  # an assignment to slots is no dead code


class ValueTracer(symbolic.SymbolicTracer):
    """Runs every node that it makes on the example, in the order of the program.

    `values` are those of the nodes, and `on_inputs` says which depend on the values of the inputs. `branches` are the
    lines that decide by such values, and `decisions` the numbers and truths that Python was given of them, in order.
    `given` names nested inputs and their entries.
    """

    whole = symbolic.PACKING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[fx.Node, Any] = {}
        self.on_inputs = Dependence(self.values)
        self.choices = Choices(self.values)
        self.branches: dict[str, None] = {}
        self.decisions: list[Any] = []
        self.inputs: dict[str, Any] = {}
        self.given: dict[fx.Node, str] = {}
        self.guarded: set[fx.Node] = set()
        self.caches: dict[Any, None] = {}  # of functions that were run on symbols
        self.running, self.thread = False, threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            with self._symbols_understood():
                graph = super().trace(root, concrete_args)
        finally:
            for cache in self.caches:
                cache.cache_clear()
        self._drop_unused(graph)
        return graph

    # -- arguments -------------------------------------------------------------------------------------------------

    def _argument(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, (bool, str, type(None))):
            return self._fixed(name, default, value)
        self.inputs[name] = pytree.tree_map_only(Tensor, torch.clone, value)
        return super()._argument(name, default, value)

    def _fixed(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        self.inputs[name] = value
        return super()._fixed(name, default, value)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        if kind != "output":
            self.values[node] = self._run(node)
            self.on_inputs.note(node)
            self._name_given(node)
        return node

    def proxy(self, node: fx.Node) -> Any:
        value = self.values[node]
        if node.op != "placeholder" and isinstance(value, (str, bool, type(None))):
            self._guard(node, value)
        decided = isinstance(value, bool) and node in self.on_inputs.values_of and node not in self.given
        if is_plain(value) and not decided and not (node.op == "placeholder" and isinstance(value, (tuple, list))):
            return value
        return proxy_of(node, self, value)

    def method(self, proxy: ValueProxy, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a method; the rank is no symbol."""
        if name in ("dim", "ndimension"):
            return proxy.concrete.ndim
        return self.create_proxy("call_method", name, (proxy, *args), kwargs)

    def keys(self, obj: Any) -> Any:
        self.length(obj)
        return list(obj.concrete)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, node: fx.Node) -> Any:
        """The value of a node on the example; of a buffer, a copy, because the program may change it."""
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        target: Any = node.target
        self.running = True
        try:
            with torch.no_grad():
                if node.op == "placeholder":
                    return self.inputs[target]
                if node.op == "get_attr":
                    found = operator.attrgetter(target)(self.root)
                    return found.clone() if type(found) is Tensor else found
                function = self.root.get_submodule(target) if node.op == "call_module" else target
                value = call_on_meta(method(target) if node.op == "call_method" else function, args, kwargs, CPU)
                return self.choices.spread(node, value)
        finally:
            self.running = False

    # -- nested inputs ---------------------------------------------------------------------------------------------

    def _name_given(self, node: fx.Node) -> None:
        """Name nested inputs and their entries."""
        inside = self.given.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "placeholder" and isinstance(self.values[node], (list, tuple, Mapping)):
            self.given[node] = str(node.target)
        elif inside is not None and (node.target in (operator.getitem, "get")):
            self.given[node] = f"{inside}[{node.args[1]!r}]"
        elif inside is not None and node.target is getattr:
            self.given[node] = f"{inside}.{node.args[1]}"

    def _guard(self, node: fx.Node, value: Any, what: str = "{}") -> None:
        """Check in the graph that an entry of a nested input, or its length, is the one that Python was given."""
        if node in self.given and node not in self.guarded:
            self.guarded.add(node)
            self.create_node("call_function", must_be, (node, value, what.format(self.given[node])), {})

    def length(self, proxy: ValueProxy) -> int:
        """The length of a symbol's value; Python decides by it where it depends on the input's values."""
        value, node = self.values[proxy.node], proxy.node
        length = _LENGTH(value)
        has_axis = isinstance(value, Tensor) or name_of(node) in PIECES
        if has_axis:
            self.on_inputs.decided_by_size(node)
        if isinstance(value, (list, tuple, Mapping)):
            self._guard(node, length, "len({})")
        return int(self._decided(length, node, length=True)) if has_axis and node in self.on_inputs.sizes_of else length

    def entries(self, proxy: ValueProxy) -> list[Any] | None:
        """The entries of a value whose number depends on choices: each of those to choose from; None for others."""
        node, value = proxy.node, self.values[proxy.node]
        if isinstance(value, tuple) or not self.choices.follow & self.on_inputs.sizes_of & {node}:
            return None
        self._decided(_LENGTH(value), node, length=True)
        return [entry.clone() for entry in value] if isinstance(value, Tensor) else list(value)

    def fixed(self, proxy: ValueProxy) -> Any:
        """The value of a symbol where Python needs it; noted with its line where it depends on the input's values."""
        value = self.values[proxy.node]
        if proxy.node not in self.on_inputs.values_of:
            self.on_inputs.decided_by_size(proxy.node)
            return value
        return self._decided(value, proxy.node)

    def _decided(self, value: Any, node: fx.Node, *, length: bool = False) -> Any:
        """A value, or the length of one, that Python decides by, or that of an earlier trace.

        Its line is noted, but not for choices.
        """
        frame = users_frame()
        line = deciding_line(frame) if frame is not None else "a line that is not in a file"
        if line and not self.choices.decided(node, length=length):
            self.branches[line] = None
        at = _LENGTH(self.decisions)
        if not _is_single(value) or at == _DECISIONS:
            return value
        known = _REPLAYED.get()[at : at + 1] or (value.item() if isinstance(value, Tensor) else value,)
        self.decisions += known
        return known[0]

    # -- functions that take no symbols ----------------------------------------------------------------------------

    @contextmanager
    def _symbols_understood(self) -> Iterator[None]:
        """Let torch's functions that make tensors of numbers, and those on dtypes, take symbols."""
        wrappers = dict.fromkeys(_REPLACED, self._recorded)
        wrappers |= dict.fromkeys((name for name in (*_ON_TYPES, *_CHECKS) if hasattr(torch, name)), _unwrapped)
        before = {name: getattr(torch, name) for name in wrappers}
        for name, function in before.items():
            setattr(torch, name, wrappers[name](function))
        builtins.len = _symbolic_length
        try:
            with _Making(self):
                yield
        finally:
            builtins.len = _LENGTH
            for name, function in before.items():
                setattr(torch, name, function)

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            return self.made(function, args, kwargs)

        return record

    def made(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function makes, which is a node where it may be changed in place: a tensor made of numbers."""
        elsewhere = threading.get_ident() != self.thread  # what is replaced in torch is so for all threads
        if self.running or elsewhere or function not in MAKING or not _can_be_written((args, kwargs)):
            return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def _drop_unused(self, graph: fx.Graph) -> None:
        """Erase unused questions about sizes and counts of choices, and unused tensors made of numbers."""
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op in ("call_function", "call_method", "get_attr"):
                counts = node in self.choices.follow and not is_in_place(node.target)
                is_number = self.values[node] is not None and not tensors_of(self.values[node])
                if is_number or counts or node.op == "get_attr" or node.target in MAKING:
                    graph.erase_node(node)


class _Making(TorchFunctionMode):
    """Lets a tracer see the functions of torch that make tensors of numbers."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.made(func, args, kwargs or {})


def _symbolic_length(obj: Any, /) -> Any:
    """The `len` of Python, but a symbol for the length of a tensor, of which Python makes a number."""
    return obj.size(0) if type(obj) is TensorProxy and obj.concrete.ndim else _LENGTH(obj)


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of plain values, as one that takes symbols for them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(ValueProxy, lambda p: p.concrete, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _can_be_written(arguments: Any) -> bool:
    """Whether a graph can name these arguments."""
    kinds = (*fx.node.base_types, type(None))
    return all(is_symbol(leaf) or issubclass(type(leaf), kinds) for leaf in pytree.tree_leaves(arguments))


def _is_single(value: Any) -> bool:
    """Whether a value is one real number, or true or false."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (bool, int, float))


@contextmanager
def replaying(decisions: Sequence[Any]) -> Iterator[None]:
    """Let traces decide by the `decisions` that an earlier one noted, whatever the values of the example."""
    token = _REPLAYED.set(tuple(decisions))
    try:
        yield
    finally:
        _REPLAYED.reset(token)


def trace(
    model: nn.Module, example: Any, *, concrete_args: Mapping[str, Any] | None = None, leaves: Sequence[Entry] = ()
) -> ModelGraph:
    """The graph of `model`, a copy of our own in eval mode, traced with the values of the example.

    Warns where these values decide by which way the graph goes, unless decisions are replayed: they were warned of.
    Raises as `symbolic.trace`.
    """
    tracer = ValueTracer(example, concrete_args, leaves)
    graph = symbolic.trace(model, example, concrete_args=concrete_args, leaves=leaves, tracer=tracer)
    tracer.choices.check()
    graph.meta[RECORD] = replace(
        captured_of(graph),
        decisions=tuple(tracer.decisions),
        by_batch=frozenset(tracer.on_inputs.by_batch),
        by_length=frozenset(tracer.on_inputs.by_length),
        by_layout=tracer.on_inputs.by_layout,
    )
    if tracer.branches and not _REPLAYED.get():
        warn(
            f"{type(model).__name__} decides by the values of its input, and the graph always goes the way that the "
            f"example went, at {'; '.join(tracer.branches)}"
        )
    return graph
