"""Passes over a graph for what its values are like: on shapes alone where that is possible, or on the numbers."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxprune.caller.batches import sample_count
from fxprune.caller.example import TensorSpec, as_call, plain, spec_of
from fxprune.caller.isolation import evaluating
from fxprune.caller.meta import CPU, META, lacking_numbers
from fxprune.caller.meta_calls import PLACES, method, mixed, shape_only, weightless
from fxprune.errors import first_line
from fxprune.tracing.flops import counting

Found = TypeVar("Found")
_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_LOG = logging.getLogger(__name__)
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Facts:
    """What a graph's values are like and what they take, by node name: specs, and flops on the whole example."""

    specs: dict[str, Any]
    flops: dict[str, int]


def annotate(graph: fx.GraphModule, example: Any) -> None:
    """Put the facts of every node that `graph` has in eval mode on `example` into its meta, as "spec" and "flops"."""
    facts = facts_on(graph, example)
    for node in graph.graph.nodes:
        node.meta |= {"spec": facts.specs[node.name], "flops": facts.flops[node.name]}


def facts_on(graph: fx.GraphModule, example: Any) -> Facts:
    """The facts of all nodes of `graph` on an example; the graph stays as it is."""

    def facts(inputs: list[Any]) -> Facts:
        with counting() as counter:
            recorder = _Recorder(graph, counter)
            recorder.run(*inputs)
        return recorder.facts

    places = places_of(graph, example)
    found = on_shapes(graph, example, facts)
    if not places:
        return found
    specs = pytree.tree_map_only(TensorSpec, lambda spec: _placed(spec, _place(places)), found.specs)
    return replace(found, specs=specs)


def _placed(spec: TensorSpec, device: torch.device) -> TensorSpec:
    """The spec of a value that was computed on shapes alone, on the device where it belongs."""
    return replace(spec, device=device) if spec.device.type == "meta" else spec


def on_shapes(graph: fx.GraphModule, example: Any, run: Callable[[list[Any]], Found]) -> Found:
    """What `run` gives for the inputs of `graph` in eval mode, for a result that depends on their shapes only.

    The graph and its inputs are on the meta device, where nothing is computed. Where they cannot be (an operation
    that needs numbers, or one that asks for the device; tensors on several devices) `run` is given the numbers; where
    there are none, those of the example, as far as they lead.
    """
    with torch.no_grad(), evaluating(graph):
        if lacking_numbers(graph) is not None:
            return run(placeholder_values(graph, example))
        if len(places_of(graph, example)) == 1 and not any(map(_asks_for_place, graph.graph.nodes)):
            try:
                with weightless(graph):
                    return run(placeholder_values(graph, pytree.tree_map_only(Tensor, shape_only, example)))
            except Exception as error:  # noqa: BLE001 - whatever an operation says that needs numbers
                _LOG.debug("%s runs on numbers: %s", type(graph).__name__, first_line(error))
        return run(placeholder_values(graph, example))


def places_of(graph: fx.GraphModule, example: Any) -> set[torch.device]:
    """The devices of all tensors of a graph and an example; none where the example holds something else, too."""
    leaves = pytree.tree_leaves(example)
    if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return set()
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return {tensor.device for tensor in (*graph.parameters(), *graph.buffers(), *tensors)}


def _place(places: set[torch.device]) -> torch.device:
    """The device that tensors on these are for; the CPU, where they have no numbers."""
    return next(iter(places - {META}), CPU)


def _asks_for_place(node: fx.Node) -> bool:
    """Whether a node's result may depend on the device that a tensor is on."""
    name = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_method", "call_function") and name in PLACES


class Shapes(fx.Interpreter):
    """Runs a graph, and steps over what is slow on the meta device although the shape of its result is plain.

    Where some values have numbers and some have not, those that follow from both have none.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return mixed(target, args, kwargs, CPU)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return mixed(method(target), args, kwargs, CPU)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.fetch_attr(target)
        short = _SHORTCUTS.get(type(module))
        if short is not None and args and isinstance(args[0], Tensor) and args[0].is_meta and not module.training:
            value = short(module, *args, **kwargs)
            if value is not None:
                return value
        return mixed(module, args, kwargs, CPU)


def _normalised(module: Any, x: Tensor) -> Tensor | None:
    """A value like that of a BatchNorm."""
    module._check_input_dim(x)
    return torch.empty_like(x) if x.shape[1] == module.num_features else None


def _recurred(module: Any, x: Tensor, hx: Any = None) -> Any:
    """Values like those of recurrent layers, after the same work: every step of every sequence meets every matrix."""
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
    output = x.new_empty(steps, batch, ways * width)
    output = output.transpose(0, 1) if module.batch_first else output
    last = x.new_empty(module.num_layers * ways, batch, width)
    if isinstance(module, nn.LSTM):
        return output, (last, x.new_empty(module.num_layers * ways, batch, module.hidden_size))
    return output, last


def _stepped(module: Any, x: Tensor, hx: Any = None) -> Any:
    """Values like those of a recurrent cell, after the same work."""
    state = hx[0] if isinstance(hx, (tuple, list)) else hx
    shape = (*x.shape[:1], module.hidden_size)
    if x.ndim != 2 or (state is not None and state.shape != shape):
        return None
    F.linear(x, module.weight_ih)
    F.linear(x.new_empty(shape), module.weight_hh)
    return (x.new_empty(shape), x.new_empty(shape)) if isinstance(module, nn.LSTMCell) else x.new_empty(shape)


_OPERATORS = (operator.add, operator.iadd, operator.mul, operator.imul)
_ALIKE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AdaptiveAvgPool2d,
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
_SHORTCUTS: dict[type[nn.Module], Callable[..., Any]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalised),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _recurred),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), _stepped),
}


class _Recorder(Shapes):
    """Runs a graph and records the facts of each node; of nodes that are alike on the meta device, the first runs."""

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
        """What the result of a node on the meta device and its flops follow from, or None where more may count."""
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
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, plain(example)))
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
