"""The second way to a graph: symbolic tracing in which every symbol knows its value on the example."""

from __future__ import annotations

import builtins
import functools
import operator
import threading
import warnings
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

from fxprune.caller.meta import CPU, META, has_numbers
from fxprune.caller.meta_calls import call_on_meta, method
from fxprune.caller.source_lines import deciding_line, users_frame
from fxprune.errors import FxpruneWarning
from fxprune.tracing import symbolic
from fxprune.tracing.checks import Entry
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, must_be
from fxprune.tracing.in_place import written
from fxprune.tracing.value_proxies import TensorProxy, ValueProxy, is_plain, is_symbol, proxy_of

_FACTORIES = (
    "zeros", "ones", "full", "empty", "arange", "range", "linspace", "logspace", "rand", "randn", "randint", "randperm",
    "tensor", "as_tensor", "scalar_tensor", "eye", "tril_indices", "triu_indices", "normal", "hann_window",
)  # fmt: skip
_MAKING = frozenset(getattr(torch, name) for name in _FACTORIES)
_REPLACED = (
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "arange",
    "tensor",
)  # of which modes see some calls only
_ON_TYPES = ("finfo", "iinfo")  # of dtypes, of which modes see none
_ABOUT_SIZES = frozenset({
    "shape", "dtype", "device", "is_cuda", "requires_grad", "layout", "itemsize", "nbytes", "is_sparse", "is_nested",
    "size", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size", "len",
    "get_device", "storage_offset", "is_inference", "type", "zeros_like", "ones_like", "empty_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "is_quantized",
})  # fmt: skip

_SIZES = frozenset({"shape", "size", "numel", "nelement", "len", "nbytes"})
_SIZED_BY_VALUES = frozenset({
    "nonzero", "argwhere", "unique", "unique_consecutive", "_unique2", "_return_output", "_return_inverse",
    "_return_counts", "_consecutive_return_output", "_consecutive_return_inverse", "_consecutive_return_counts",
    "masked_select", "bincount", "repeat_interleave", "histc", "combinations", "nonzero_static",
})  # fmt: skip
_SIZED_AS_FIRST = frozenset({
    "index_add", "index_copy", "index_fill", "index_put", "scatter", "scatter_add", "scatter_reduce", "masked_fill",
    "masked_scatter", "setitem", "index_reduce", "slice_scatter", "select_scatter",
})  # fmt: skip
_SIZED_BY_NUMBERS = frozenset({
    "getitem", "narrow", "view", "reshape", "expand", "repeat", "tile", "unflatten", "split", "chunk", "new_zeros",
    "new_ones", "new_full", "new_empty",
})  # fmt: skip
_COMPARISONS = frozenset({operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge})
_ON_LAYOUT = frozenset({
    "is_contiguous", "stride", "view",
})  # fmt: skip
_PIECES = frozenset({"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "tolist"})
_LENGTH = builtins.len
_LARGEST = 1 << 24  # of which a number is worth a try that a forward compares with a size
_DECISIONS = 4096  # that are noted of one trace
_REPLAYED: ContextVar[tuple[Any, ...]] = ContextVar("decisions of an earlier trace", default=())

fx.node.has_side_effect(operator.setitem)  # an assignment to slots is no dead code


class ValueTracer(symbolic.SymbolicTracer):
    """Runs every node that it makes on the example, in the order of the program.

    `values` are those of the nodes. `dependent` are the nodes whose values depend on those of the inputs, not only on
    their sizes, and `sized` those whose sizes do, too. `branches` are the lines that decide by such values, and
    `decisions` the numbers and truths that Python was given of them, in order. `by_batch`, `by_length` and `by_layout`
    are those of `Captured`. `given` names nested inputs and their entries.
    """

    whole = symbolic.PACKING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[fx.Node, Any] = {}
        self.dependent: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self.stored: dict[int, list[fx.Node]] = {}  # the nodes whose tensors share a storage
        self.branches: dict[str, None] = {}
        self.decisions: list[Any] = []
        self.by_batch: set[float] = set()
        self.by_length: set[float] = set()
        self.by_layout = False
        self.inputs: dict[str, Any] = {}
        self.given: dict[fx.Node, str] = {}
        self.guarded: set[fx.Node] = set()
        self.running, self.thread = False, threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with self._symbols_understood():
            graph = super().trace(root, concrete_args)
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
            self._note_dependence(node)
            self._note_comparison(node)
            self._name_given(node)
        return node

    def proxy(self, node: fx.Node) -> Any:
        value = self.values[node]
        if node.op != "placeholder" and isinstance(value, (str, bool, type(None))):
            self._guard(node, value)
        decided = isinstance(value, bool) and node in self.dependent and node not in self.given
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
                return call_on_meta(method(target) if node.op == "call_method" else function, args, kwargs, CPU)
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

    # -- what depends on values ------------------------------------------------------------------------------------

    def _note_dependence(self, node: fx.Node) -> None:
        """Note whether the value of a node, and its sizes, depend on the values of the inputs."""
        name = _name_of(node)
        for tensor in _tensors(self.values[node]):
            if has_numbers(tensor) and tensor.layout is torch.strided:
                self.stored.setdefault(tensor.untyped_storage().data_ptr(), []).append(node)
        if self._has_dependent_sizes(node, name):
            self.sized.add(node)
        into = list(written(node.target, node.args, node.kwargs))
        if into and into[0] is node.all_input_nodes[0]:
            self._forget(node)
        read = self.sized if name in _SIZES else self.dependent
        known = name in _ABOUT_SIZES and name not in _SIZES
        if node.op != "placeholder" and (known or not read.intersection(node.all_input_nodes)):
            return
        self.dependent.add(node)
        self.dependent.update(into)
        for tensor in (tensor for other in into for tensor in _tensors(self.values[other])):
            if has_numbers(tensor) and tensor.layout is torch.strided:
                self.dependent.update(self.stored.get(tensor.untyped_storage().data_ptr(), ()))

    def _has_dependent_sizes(self, node: fx.Node, name: str) -> bool:
        """Whether the sizes of a node's tensors, or its length, depend on the values of the inputs."""
        read, value = node.all_input_nodes, self.values[node]
        tensors = [tensor for tensor in _tensors(value) if tensor.ndim]
        if node.op == "placeholder" or not read or not (tensors or name == "tolist"):
            return False
        if self.sized.intersection(read[:1] if name.rstrip("_") in _SIZED_AS_FIRST else read):
            return True
        dependent = [other for other in read if other in self.dependent]
        if name == "getitem":
            masks = (self.values[other] for other in dependent if other is not node.args[0])
            if any(isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
                return True
        if name in _SIZED_BY_NUMBERS or node.target in _MAKING:
            return any(type(self.values[other]) is int for other in dependent)
        if name == "where":
            return bool(dependent) and _LENGTH(node.args) + _LENGTH(node.kwargs) == 1
        return bool(dependent) and name in _SIZED_BY_VALUES and (name != "repeat_interleave" or _LENGTH(read) > 1)

    def length(self, proxy: ValueProxy) -> int:
        """The length of a symbol's value; Python decides by it where it depends on the input's values."""
        value, node = self.values[proxy.node], proxy.node
        length = _LENGTH(value)
        name = str(getattr(node.target, "__name__", node.target))
        if isinstance(value, Tensor) or name in _PIECES:
            self._decided_by_size(node)
        if isinstance(value, (list, tuple, Mapping)):
            self._guard(node, length, "len({})")
        if node not in self.sized or not (isinstance(value, Tensor) or name in _PIECES):
            return length
        return int(self._decided(length))

    def _note_comparison(self, node: fx.Node) -> None:
        """Note by what a comparison of sizes is decided, and questions about how tensors lie in memory."""
        self.by_layout |= _name_of(node) in _ON_LAYOUT
        if node.target in _COMPARISONS and isinstance(self.values[node], bool) and node not in self.dependent:
            pair = [self.values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
            one, other = (value if isinstance(value, tuple) else (value,) for value in pair)
            known = (int, float)
            ratios = [
                b / a
                for a, b in zip(one, other, strict=False)
                if isinstance(a, known) and isinstance(b, known) and a > 0 < b
            ]
            self._decided_by_size(node, *ratios, *(1 / ratio for ratio in ratios))

    def _decided_by_size(self, node: fx.Node, *ratios: float) -> None:
        """Note that Python decides by a size, unless it only asserts something of it."""
        frame = users_frame()
        if frame is None or deciding_line(frame):
            beside = {1.0, *(ratio for ratio in ratios if 1 / _LARGEST < ratio < _LARGEST)}
            first, others = self._axes_of(node)
            self.by_batch |= beside if first else set()
            self.by_length |= beside if others else set()

    def _axes_of(self, node: fx.Node) -> tuple[bool, bool]:
        """Whether a number follows from the length of a first axis, and whether from that of another one."""
        first, others, sources, seen = False, False, [node], set[fx.Node]()
        while sources:
            source = sources.pop()
            seen.add(source)
            name, index = _name_of(source), source.args[-1] if source.args else None
            of_shape = name == "getitem" and isinstance(self.values[source.args[0]], torch.Size)  # type: ignore[index]
            if isinstance(index, int) and (of_shape or name == "size"):
                first, others = first or index == 0, others or index != 0
            elif name in _SIZES or name in _PIECES:
                return True, True
            else:
                sources += {node for node in source.all_input_nodes if node not in self.dependent} - seen
        return first, others

    def _forget(self, node: fx.Node) -> None:
        """Drop the numbers of the value that a node writes into, where the values that it writes have none."""
        written, *others = node.all_input_nodes
        if any(not has_numbers(t) for other in others for t in _tensors(self.values[other])):
            self.values[written] = pytree.tree_map_only(Tensor, lambda t: t.to(META), self.values[written])

    def fixed(self, proxy: ValueProxy) -> Any:
        """The value of a symbol where Python needs it; noted with its line where it depends on the input's values."""
        value = self.values[proxy.node]
        if proxy.node not in self.dependent:
            self._decided_by_size(proxy.node)
            return value
        return self._decided(value)

    def _decided(self, value: Any) -> Any:
        """A value that Python decides by, or that of an earlier trace; its line is noted."""
        frame = users_frame()
        line = deciding_line(frame) if frame is not None else "a line that is not in a file"
        if line:
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
        wrappers = dict.fromkeys(_REPLACED, self._recorded) | dict.fromkeys(_ON_TYPES, _unwrapped)
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
        if self.running or elsewhere or function not in _MAKING or not _can_be_written((args, kwargs)):
            return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def _drop_unused(self, graph: fx.Graph) -> None:
        """Erase unused questions about sizes, and unused tensors made of numbers."""
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op in ("call_function", "call_method", "get_attr"):
                is_number = self.values[node] is not None and not _tensors(self.values[node])
                if is_number or node.op == "get_attr" or node.target in _MAKING:
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


def _name_of(node: fx.Node) -> str:
    """The name of the function, method or attribute of a node."""
    return str(node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target))


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


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def trace(
    model: nn.Module, example: Any, *, concrete_args: Mapping[str, Any] | None = None, leaves: Sequence[Entry] = ()
) -> ModelGraph:
    """The graph of `model`, a copy of our own in eval mode, traced with the values of the example.

    Warns where these values decide by which way the graph goes, unless decisions are replayed: they were warned of.
    Raises as `symbolic.trace`.
    """
    tracer = ValueTracer(example, concrete_args, leaves)
    graph = symbolic.trace(model, example, concrete_args=concrete_args, leaves=leaves, tracer=tracer)
    graph.meta[RECORD] = replace(
        captured_of(graph),
        decisions=tuple(tracer.decisions),
        by_batch=frozenset(tracer.by_batch),
        by_length=frozenset(tracer.by_length),
        by_layout=tracer.by_layout,
    )
    if tracer.branches and not _REPLAYED.get():
        warnings.warn(
            f"{type(model).__name__} decides by the values of its input, and the graph always goes the way that the "
            f"example went, at {'; '.join(tracer.branches)}",
            FxpruneWarning,
            stacklevel=4,
        )
    return graph
