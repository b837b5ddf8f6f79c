"""The first way to a graph: symbolic tracing by torch.fx, which keeps layers with rules as single nodes."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace as fx_internals
from torch.nn.utils import parametrize, rnn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call
from fxprune.caller.overrides import changed
from fxprune.caller.source_lines import users_line
from fxprune.errors import CaptureError
from fxprune.rules.experts import experts_forward, has_stacked_experts
from fxprune.rules.table import RULES, module_class
from fxprune.rules.vision import register_torchvision
from fxprune.tracing.attention import MultiheadAttention
from fxprune.tracing.checks import Entry, is_named, signature_of
from fxprune.tracing.graph import RECORD, Captured, ModelGraph, must_be
from fxprune.tracing.hooks import hooked, layer_within_hooks, remove_hooks
from fxprune.tracing.in_place import viewed, written
from fxprune.tracing.value_proxies import MappingProxy, Symbol, is_symbol

_OPENED = (
    nn.Module, nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip
_DROPOUTS: dict[Any, type[nn.Module]] = {
    torch.dropout: nn.Dropout, F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d, F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip
_NUMBERS = (bool, int, float, str, type(None))  # what a graph can compare and print
PACKING: tuple[Callable[..., Any], ...] = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)
_MAKERS: tuple[Callable[..., Any], ...] = (torch.zeros, torch.ones, torch.arange)


class SymbolicTracer(fx.Tracer):
    """Traces into everything but the layers of torch.nn and modules that have a rule.

    `concrete` are arguments of the forward that are removed from its signature; those that the example leaves out keep
    their places and are fixed at their defaults. `leaves` are kept as single nodes; `kept` names those that were met.
    """

    proxy_buffer_attributes = True
    whole = (*PACKING, *_MAKERS)  # functions that are nodes, under whatever name

    def __init__(
        self, example: Any = (), concrete: Mapping[str, Any] | None = None, leaves: Sequence[Entry] = ()
    ) -> None:
        super().__init__(autowrap_functions=self.whole)
        self._autowrap_search += _modules_with(self.whole, len(sys.modules))
        self.example, self.concrete, self.leaves = example, dict(concrete or {}), leaves
        self.kept: dict[str, None] = {}
        self.refused: list[str] = []

    def proxy(self, node: fx.Node) -> Any:
        return Symbol(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The attribute of a module, which is a symbol already where the forward assigned one."""
        return attr_val if is_symbol(attr_val) else super().getattr(attr, attr_val, parameter_proxy_cache)

    def refuse(self, why: str) -> Any:
        """Raise CaptureError, and remember it in case the forward catches it."""
        self.refused.append(f"{why}, which symbolic tracing does not know")
        raise CaptureError(self.refused[-1])

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refused.append("the forward decides by a value, which symbolic tracing does not know")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refused.append("the forward goes through a value, which symbolic tracing does not know")
        return super().iter(obj)

    def unpacked(self, node: fx.Node, count: int) -> None:
        """Check in the graph that an input that is unpacked, or an entry of one, has this many entries."""
        source = node
        while source.target is operator.getitem:
            source = source.args[0]  # type: ignore[assignment]
        if source.op == "placeholder":
            self.create_node("call_function", must_be, (node, count, f"len({node.name})"), {})

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        """A node with the user's line it comes from; the stack that torch.fx records takes longer than the trace.

        Lengths by which sequences are packed are moved to the CPU, where torch wants them.
        """
        if target is PACKING[0] and "lengths" in kwargs:
            kwargs = kwargs | {"lengths": self._on_cpu(kwargs["lengths"])}
        elif target is PACKING[0]:
            args = (args[0], self._on_cpu(args[1]), *args[2:])
        if kind in ("call_function", "call_method"):
            self._check_written(target, args, kwargs)
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        node.stack_trace = users_line()
        return node

    def _check_written(self, target: Any, args: Any, kwargs: Any) -> None:
        """Refuse calls that write into a parameter, or into a tensor that the forward made without symbols."""
        for node in written(target, args, kwargs):
            base = viewed(node)
            if base.op != "get_attr":
                continue
            if str(base.target).startswith("_tensor_constant"):
                self.refuse("the forward writes a value into a tensor that was made without one")
            if self._is_parameter(str(base.target)):
                self.refuse(f"the forward writes into the parameter {base.target}")

    def _is_parameter(self, path: str) -> bool:
        """Whether the model has a parameter at a path."""
        owner, _, name = path.rpartition(".")
        return name in self.root.get_submodule(owner)._parameters

    def _on_cpu(self, value: Any) -> Any:
        is_there = not isinstance(value, fx.Node) or value.target == "cpu"
        return value if is_there else self.create_node("call_method", "cpu", (value,), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_named(self.leaves, m, module_qualified_name):
            self.kept[module_qualified_name] = None
            return True
        if any(hooked(child) for child in m.modules() if child is not m):
            return False
        return module_class(m) is not None or _is_layer_of_torch(m)

    def create_arg(self, a: Any) -> Any:
        if is_symbol(a):
            written = vars(a).get("written") if type(a) is MappingProxy else None
            return a.node if written is None else self.create_arg(written)
        if is_dataclass(a) and not isinstance(a, type) and _holds_proxy(a):
            given = {field.name: getattr(a, field.name) for field in fields(a)}
            some = {name: self.create_arg(value) for name, value in given.items() if value is not None}
            return self.create_node("call_function", type(a), (), some)
        if isinstance(a, nn.Parameter) and not any(a is own for own in self.root.parameters()):
            return super().create_arg(a.detach())  # of a layer that the model does not own: a constant
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - as in torch.fx
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        """Make a placeholder of every argument that the forward has, or that the example gives to its star ones."""
        args, kwargs = as_call(self.example)
        signature = signature_of(self.root, self.concrete)
        given = signature.bind(*args, **kwargs).arguments
        positional: list[Any] = []
        named = dict(self.concrete)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                values = enumerate(given.get(name, ()))
                positional += [self._argument(f"{name}_{i}", (), value) for i, value in values]
            elif parameter.kind is parameter.VAR_KEYWORD:
                named |= {key: self._argument(key, (None,), value) for key, value in given.get(name, {}).items()}
            elif name not in given:
                self._fixed(name, self._default(parameter), parameter.default)
            elif name in kwargs or self._comes_after_concrete(name):
                named[name] = self._argument(name, self._default(parameter), given[name])
            else:
                positional.append(self._argument(name, self._default(parameter), given[name]))

        def run() -> Any:
            _say_eager()
            return self.root(*positional, **named)

        return run, []

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The node of a layer, between those of its hooks, or the nodes of a module that is traced into.

        The root has no node, and neither has a module that the forward itself makes.
        """
        path = (self.submodule_paths or {}).get(m)
        if not path:
            return forward(*args, **kwargs)
        if has_stacked_experts(m) and not hooked(m):
            forward = partial(experts_forward, m)
        if not hooked(m) or not self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        node = partial(super().call_module, m, forward)
        with layer_within_hooks(m, lambda *args, **kwargs: node(args, kwargs)):
            return forward(*args, **kwargs)

    def _comes_after_concrete(self, name: str) -> bool:
        """Whether an argument cannot be given by its place, because one before it is concrete."""
        order = list(inspect.signature(self.root.forward).parameters)
        return any(other in order and order.index(other) < order.index(name) for other in self.concrete)

    def _default(self, parameter: inspect.Parameter) -> tuple[Any, ...]:
        """The default of a placeholder: the parameter's, or None behind another default."""
        after_default = any(node.op == "placeholder" and node.args for node in self.graph.nodes)
        if parameter.default is parameter.empty:
            return (None,) if after_default else ()
        return (parameter.default if isinstance(parameter.default, _NUMBERS) else None,)

    def _argument(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        """A placeholder for an argument that the example gives."""
        return self.create_proxy("placeholder", name, default, {})

    def _fixed(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        """A placeholder of an argument at whose value the graph is fixed, and a node that checks it."""
        if isinstance(value, _NUMBERS):
            node = self.create_node("placeholder", name, default, {})
            self.create_node("call_function", must_be, (node, value, name), {})
        return value


def trace(
    model: nn.Module,
    example: Any,
    *,
    concrete_args: Mapping[str, Any] | None = None,
    leaves: Sequence[Entry] = (),
    tracer: SymbolicTracer | None = None,
) -> ModelGraph:
    """The graph of `model`, a copy of our own in eval mode, as `tracer`, if given, records it.

    Arguments of the forward that the example leaves out are fixed at their defaults.

    Raises whatever stops the tracer, and CaptureError where the forward caught that.
    """
    register_torchvision()
    _register_constants(model)
    own = tracer or SymbolicTracer(example, concrete_args, leaves)
    with _opened_functions(), _opened_scripts(), _variables_passed(), _attributes_kept(model):
        graph = own.trace(model)
    if own.refused:
        raise CaptureError(f"{own.refused[0]}, and it catches the error that says so")
    _register_constants(model)
    _drop_unused_attention_weights(graph)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target is getattr):
            graph.erase_node(node)  # the forward may have replaced it since; later traces would not find it
        elif node.target in own.whole:
            node.meta.pop("is_wrapped", None)  # fx would wrap it under a dotted name, and later traces would fail
    captured = ModelGraph(model, graph, type(model).__name__)
    captured.meta[RECORD] = Captured(leaves=tuple(own.kept))
    _use_dropout_modules(captured)
    return captured


def _is_layer_of_torch(module: nn.Module) -> bool:
    """Whether a module computes what a class of torch.nn does, and not only holds other modules."""
    kinds = type(module).__mro__[parametrize.is_parametrized(module) :]
    layer = next(cls for cls in kinds if cls.__module__.startswith("torch.nn"))
    owner = next(cls for cls in layer.__mro__ if "forward" in vars(cls))
    return owner not in _OPENED and not changed(module, layer)


@functools.lru_cache(maxsize=4)
def _modules_with(functions: Sequence[Callable[..., Any]], count: int) -> list[ModuleType]:
    """The imported modules, of which there are `count`, that have one of these functions under its own name.

    A model's helpers are among them.
    """
    modules: list[Any] = list(sys.modules.values())  # of which some may be anything
    found, named = [module for module in modules if isinstance(module, ModuleType)], {f.__name__: f for f in functions}
    return [m for m in found if any(vars(m)[name] is named[name] for name in named.keys() & vars(m).keys())]


def _holds_proxy(value: Any) -> bool:
    """Whether a dataclass holds a proxy, in nested containers too."""
    return any(_is_traced(vars(value)[field.name]) for field in fields(value))


def _is_traced(value: Any) -> bool:
    """Whether a value is a symbol, or a container of some."""
    return any(map(is_symbol, pytree.tree_leaves(value)))


def _say_eager() -> None:
    """Let torch.fx answer a forward that it is not traced; torch.fx sets this back itself."""
    if hasattr(fx_internals, "_set_is_fx_tracing"):
        fx_internals._set_is_fx_tracing(False)  # noqa: FBT003 - takes no names
    else:
        fx_internals._is_fx_tracing_flag = False  # type: ignore[attr-defined]


@contextmanager
def _opened_functions() -> Iterator[None]:
    """Trace into the functions that torchvision has wrapped for torch.fx and that have no rule."""
    table = fx_internals._wrapped_fns_to_patch
    before = dict(table)
    for (home, name), namespace in before.items():
        if str(namespace.get("__name__")).startswith("torchvision.") and namespace[name] not in RULES:
            del table[home, name]
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def _opened_scripts() -> Iterator[None]:
    """Trace into functions that torch.jit compiled: given symbols, they call the Python function of their source."""
    kind: Any = torch.jit.ScriptFunction
    compiled = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        source = getattr(self, "_torchdynamo_inline", None)
        if source is None or not _is_traced((args, kwargs)):
            return compiled(self, *args, **kwargs)
        return source(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = compiled


@contextmanager
def _variables_passed() -> Iterator[None]:
    """Let the old `Variable(x)` of torch, which makes a tensor anew, be `x` where that is a symbol."""
    kind = type(torch.autograd.Variable)

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())[:1]
        return given[0] if given and is_symbol(given[0]) else type.__call__(cls, *args, **kwargs)

    kind.__call__ = call  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del kind.__call__


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back attributes and buffers to which the forward assigns symbols; then remove the hooks."""
    stores = [store for module in model.modules() for store in (vars(module), module._buffers, module._parameters)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, old in zip(stores, before, strict=True):
            new = {name: value for name, value in store.items() if value is not old.get(name, store)}
            for name in [name for name, value in new.items() if _is_traced(value)]:
                del store[name]
                store.update({name: old[name]} if name in old else {})
        remove_hooks(model)


def _register_constants(model: nn.Module) -> None:
    """Make buffers outside the state_dict of tensors kept as plain attributes: they move and narrow with the rest."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                delattr(module, name)
                if hasattr(module, name):
                    module.__class__ = _reading(type(module), name)  # type: ignore[arg-type]
                module._buffers[name] = value.detach()  # register_buffer refuses what is also found in the class
                module._non_persistent_buffers_set.add(name)


@functools.cache
def _reading(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass for modules whose class has an attribute with the name of a buffer: it gives the buffer instead."""

    def reduced(self: nn.Module, protocol: Any) -> Any:  # copies and pickles name the class of the user's
        return _instance, (kind, name), vars(self)

    own = {name: property(lambda self: self._buffers[name]), "__module__": kind.__module__, "__reduce_ex__": reduced}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(own))


def _instance(kind: type[nn.Module], name: str) -> nn.Module:
    """A module of such a class, without anything in it."""
    made: type[nn.Module] = _reading(kind, name)  # type: ignore[arg-type]
    return made.__new__(made)


def _drop_unused_attention_weights(graph: fx.Graph) -> None:
    """Remove the unused nodes of attention, which gives its weights beside its output."""
    for node in reversed(list(graph.nodes)):
        inside = list((node.meta.get("nn_module_stack") or {}).values())
        if inside and inside[-1][1] is MultiheadAttention and not node.users and node.op.startswith("call"):
            graph.erase_node(node)


def _use_dropout_modules(graph: ModelGraph) -> None:
    """Replace functional dropouts, whose `training` flag tracing has fixed, by modules that follow the model's mode.

    Those that also drop in eval mode are kept.
    """
    replaced = False
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in _DROPOUTS:
            continue
        drops = node.target not in (F.alpha_dropout, F.feature_alpha_dropout)  # by default
        named = {"training" if name == "train" else name: value for name, value in node.kwargs.items()}
        given = {"p": 0.5, "training": drops} | dict(zip(("input", "p", "training"), node.args, strict=False)) | named
        if not given["training"]:
            name, replaced = f"{node.name}_module", True
            graph.add_module(name, _DROPOUTS[node.target](given["p"]).eval())
            node.op, node.target, node.args, node.kwargs = "call_module", name, (given["input"],), {}
    if replaced:
        graph.recompile()
