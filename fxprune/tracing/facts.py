"""The shapes, dtypes and flops of a graph's values, found on shapes alone where that is possible."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import sample_count
from fxprune.caller.example import TensorSpec, as_call, copied, plain, spec_of
from fxprune.caller.isolation import evaluating, in_eval_mode
from fxprune.caller.meta import CPU, META
from fxprune.caller.meta_calls import PLACES, call_on_meta, method, shape_only, weightless
from fxprune.errors import first_line
from fxprune.tracing.choices import Choices
from fxprune.tracing.flops import counting
from fxprune.tracing.layer_shapes import shape_of_layer, shape_of_sum

_OPERATORS = (operator.add, operator.iadd, operator.mul, operator.imul)
_LOG = logging.getLogger(__name__)
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Facts:
    """The specs of a graph's values, and their flops on the whole example, by node name.

    Choices, such as those of experts, are spread evenly over the options. If no row has chosen some option, so that
    values are empty, `short` is the factor on the number of rows that would be enough; otherwise it is 1.
    """

    specs: dict[str, Any]
    flops: dict[str, int]
    short: int = 1


def annotate(graph: fx.GraphModule, example: Any) -> int:
    """Put the facts of every node of `graph` in eval mode on `example` into its meta, as "spec" and "flops".

    Returns how many times as many samples are needed, see `Facts`.
    """
    facts = facts_on(graph, example)
    for node in graph.graph.nodes:
        node.meta |= {"spec": facts.specs[node.name], "flops": facts.flops[node.name]}
    return facts.short


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
    recorder = _Recorder(graph)
    recorder.run(*placeholder_values(graph, example))
    specs = (leaf for leaf in pytree.tree_leaves(recorder.facts.specs) if isinstance(leaf, TensorSpec))
    empty = recorder.choices.short > 1 and any(0 in spec.shape for spec in specs)
    return replace(recorder.facts, short=recorder.choices.short if empty else 1)


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


class _Recorder(fx.Interpreter):
    """Runs a graph and records the facts of each node.

    Values that follow from some with numbers and some without have none.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.counter, self.facts, self.choices = counting(), Facts({}, {}), Choices(self.env)

    def run_node(self, n: fx.Node) -> Any:
        found = self._known(n)
        if found is None:
            with self.counter:
                value = super().run_node(n)
            self.choices.values = self.env  # which run() replaces
            found = self.choices.spread(n, value), int(self.counter.get_total_flops())
        value, self.facts.flops[n.name] = found
        self.facts.specs[n.name] = spec_of(value)
        return value

    def _known(self, node: fx.Node) -> Any:
        """The value and the flops of a node that torch does not have to run."""
        if node.op == "call_module":
            return shape_of_layer(self.fetch_attr(str(node.target)), *self.fetch_args_kwargs_from_env(node))
        if node.op == "call_function" and node.target in _OPERATORS and not node.kwargs:
            return shape_of_sum(*(self.env.get(arg) if isinstance(arg, fx.Node) else arg for arg in node.args))
        return None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_on_meta(method(target) if isinstance(target, str) else target, args, kwargs, CPU)

    call_method = call_function

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_on_meta(self.fetch_attr(target), args, kwargs, CPU)


def placeholder_values(graph: fx.GraphModule, example: Any) -> list[Any]:
    """The values of the graph's placeholders, in order, for an example; those left out take their defaults.

    Tensors are copied: a model may change its inputs in place.
    """
    args, kwargs = as_call(copied(plain(example)))
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
