"""The shapes, dtypes and flops of a graph's values, found on shapes alone where that is possible."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxprune.caller.batches import sample_count
from fxprune.caller.example import TensorSpec, as_call, spec_of
from fxprune.caller.isolation import evaluating, in_eval_mode
from fxprune.caller.meta import CPU, META
from fxprune.caller.meta_calls import PLACES, method, mixed, shape_only, weightless
from fxprune.errors import first_line
from fxprune.tracing.flops import counting

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_LOG = logging.getLogger(__name__)
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Facts:
    """The specs of a graph's values, and their flops on the whole example, by node name."""

    specs: dict[str, Any]
    flops: dict[str, int]


def annotate(graph: fx.GraphModule, example: Any) -> None:
    """Put the facts of every node of `graph` in eval mode on `example` into its meta, as "spec" and "flops"."""
    facts = facts_on(graph, example)
    for node in graph.graph.nodes:
        node.meta |= {"spec": facts.specs[node.name], "flops": facts.flops[node.name]}


def facts_on(graph: fx.GraphModule, example: Any) -> Facts:
    """The facts of all nodes of `graph` in eval mode on an example; the graph is left as it was.

    They are found on the meta device, where nothing is computed. Where that is impossible (an operation needs numbers
    or asks for the device; tensors are on several devices) the graph runs on numbers, or on as many as there are.
    """
    places = places_of(graph, example)
    on_shapes = len(places) == 1 and not any(map(_asks_for_place, graph.graph.nodes)) and META not in places
    facts = None
    with torch.no_grad():
        if on_shapes:
            try:
                with in_eval_mode(graph), weightless(graph):
                    facts = _recorded(graph, pytree.tree_map_only(Tensor, shape_only, example))
            except Exception as error:  # noqa: BLE001 - whatever an operation raises that needs numbers
                _LOG.debug("%s runs on numbers: %s", type(graph).__name__, first_line(error))
        if facts is None:
            with evaluating(graph):
                facts = _recorded(graph, example)
    home = next(iter(places - {META}), CPU)
    for name, spec in facts.specs.items() if places else ():
        facts.specs[name] = pytree.tree_map_only(TensorSpec, partial(_placed, home), spec)
    return facts


def _recorded(graph: fx.GraphModule, example: Any) -> Facts:
    with counting() as counter:
        recorder = _Recorder(graph, counter)
        recorder.run(*placeholder_values(graph, example))
    return recorder.facts


def _placed(home: torch.device, spec: TensorSpec) -> TensorSpec:
    """The spec of a value that has a shape only, on the device where its numbers belong."""
    return replace(spec, device=home) if spec.device == META else spec


def places_of(graph: fx.GraphModule, example: Any) -> set[torch.device]:
    """The devices of all tensors of a graph and an example; none where the example holds more than tensors."""
    leaves = pytree.tree_leaves(example)
    if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return set()
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return {tensor.device for tensor in (*graph.parameters(), *graph.buffers(), *tensors)}


def _asks_for_place(node: fx.Node) -> bool:
    """Whether the result of a node may depend on a tensor's device."""
    name = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_method", "call_function") and name in PLACES


class Shapes(fx.Interpreter):
    """Runs a graph, but for layers that are slow on the meta device although the shape of their output is plain.

    Values that follow from some with numbers and some without have none.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return mixed(method(target) if isinstance(target, str) else target, args, kwargs, CPU)

    call_method = call_function

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.fetch_attr(target)
        shortcut = _SHORTCUTS.get(type(module))
        if shortcut and args and isinstance(args[0], Tensor) and args[0].is_meta and not module.training:
            value = shortcut(module, *args, **kwargs)
            if value is not None:
                return value
        return mixed(module, args, kwargs, CPU)


def _elementwise(module: Any, x: Tensor) -> Tensor | None:
    """A value like that of an activation, which torch takes apart into small operations on the meta device."""
    if not x.is_floating_point():
        return None
    return x if getattr(module, "inplace", False) else torch.empty_like(x)


def _normalised(module: Any, x: Tensor) -> Tensor | None:
    """A value like that of a BatchNorm."""
    module._check_input_dim(x)
    return torch.empty_like(x) if x.shape[1] == module.num_features else None


def _recurred(module: Any, x: Tensor, hx: Any = None) -> Any:
    """Values like those of recurrent layers, after the same products of matrices."""
    if x.ndim == 2:  # one sequence, not a batch
        batch = 0 if module.batch_first else 1
        states = pytree.tree_map_only(Tensor, lambda state: state.unsqueeze(1), hx)
        output, last = _recurred(module, x.unsqueeze(batch), states)
        return output.squeeze(batch), pytree.tree_map_only(Tensor, lambda state: state.squeeze(1), last)
    if hx is None:
        module.check_input(x, None)
    else:
        module.check_forward_args(x, hx, None)
    for weight in module.parameters():
        if weight.ndim == 2:
            F.linear(x.new_empty(*x.shape[:2], weight.shape[1]), weight)
    width, ways = module.proj_size or module.hidden_size, 2 if module.bidirectional else 1
    steps, batch = (x.shape[1], x.shape[0]) if module.batch_first else x.shape[:2]
    output, states = x.new_empty(steps, batch, ways * width), (module.num_layers * ways, batch)
    output = output.transpose(0, 1) if module.batch_first else output
    last = x.new_empty(*states, width)
    return output, (last, x.new_empty(*states, module.hidden_size)) if isinstance(module, nn.LSTM) else last


def _stepped(module: Any, x: Tensor, hx: Any = None) -> Any:
    """Values like those of a recurrent cell, after the same products of matrices."""
    state = hx[0] if isinstance(hx, (tuple, list)) else hx
    shape = (*x.shape[:1], module.hidden_size)
    if x.ndim != 2 or (state is not None and state.shape != shape):
        return None
    F.linear(x, module.weight_ih)
    F.linear(x.new_empty(shape), module.weight_hh)
    return (x.new_empty(shape), x.new_empty(shape)) if isinstance(module, nn.LSTMCell) else x.new_empty(shape)


_OPERATORS = (operator.add, operator.iadd, operator.mul, operator.imul)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
_ALIKE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_SHORTCUTS: dict[type[nn.Module], Callable[..., Any]] = {
    **dict.fromkeys(_ACTIVATIONS, _elementwise),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalised),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _recurred),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), _stepped),
}


class _Recorder(Shapes):
    """Runs a graph and records the facts of each node; of nodes that are alike on the meta device, only one runs."""

    def __init__(self, graph: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph)
        self.counter, self.facts, self.total = counter, Facts({}, {}), 0
        self.known: dict[Any, tuple[_Form, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        kind = self._kind(n)
        if kind in self.known:
            (shape, stride, dtype), flops = self.known[kind]
            value = torch.empty_strided(shape, stride, dtype=dtype, device=META)
        else:
            value, before = super().run_node(n), self.total
            self.total = int(self.counter.get_total_flops())
            flops = self.total - before
            if kind is not None:
                self.known[kind] = _form(value), flops
        self.facts.specs[n.name], self.facts.flops[n.name] = spec_of(value), flops
        return value

    def _kind(self, node: fx.Node) -> Any:
        """All that the result of a node on the meta device and its flops depend on, or None where that is unknown."""
        call: Any = self.fetch_attr(str(node.target)) if node.op == "call_module" else node.target
        if node.kwargs or not (type(call) in _ALIKE or (node.op == "call_function" and call in _OPERATORS)):
            return None
        own = call._parameters.values() if isinstance(call, nn.Module) else ()
        tensors = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in (*node.args, *own)]
        if not all(t is None or (isinstance(t, Tensor) and t.is_meta) for t in tensors):
            return None
        what = repr(call) if isinstance(call, nn.Module) else call
        return what, *(t if t is None else _form(t) for t in tensors)


def _form(tensor: Tensor) -> _Form:
    """All there is to a tensor on the meta device."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def placeholder_values(graph: fx.GraphModule, example: Any) -> list[Any]:
    """The values of the graph's placeholders, in order, for an example; those left out take their defaults.

    Tensors are copied: a model may change its inputs in place.
    """
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, example))
    rest, values = list(args), []
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("*"):
            values.extend(rest if not name.startswith("**") else [])
            rest = []
        elif rest:
            values.append(rest.pop(0))
        else:
            values.append(kwargs[name] if name in kwargs else node.args[0])
    return values


def parameters(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's formulas)."""
    return sum(facts_on(model, example).flops.values()) // 2 // sample_count(example)
