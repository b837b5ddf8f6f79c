"""Other spellings of the calls of a network: arguments by name, empty slices, sizes that are read from a tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from random_nets import RandomNet
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

import fxprune
from fxprune.rules.arguments import signatures
from fxprune.rules.table import RULES, key_of

Values = dict[fx.Node, Any]
Way = Callable[[fx.GraphModule, fx.Node, Values], None]


def respelled(net: RandomNet, way: Way) -> fx.GraphModule:
    """The network with every call that has a rule in another spelling, wherever torch takes that."""
    graph = copy.deepcopy(fxprune.capture(net, net.example()))
    inputs, values = iter(net.example()), Values()
    for node in list(graph.graph.nodes):
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            values[node] = getattr(graph.get_submodule(owner), name)
        elif node.op != "output":
            if key_of(node, graph) in RULES:
                way(graph, node, values)
            values[node] = call(graph, node, *map_arg((node.args, node.kwargs), values.__getitem__))
    return fx.GraphModule(graph, graph.graph)


def call(graph: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node gives for other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*args, **kwargs)


def takes(graph: fx.GraphModule, node: fx.Node, values: Values, args: Any, kwargs: Any) -> Any:
    """What a node gives for copies of other arguments, or None where torch refuses them."""
    given = map_arg((args, kwargs), values.__getitem__)
    try:
        return call(graph, node, *pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given))
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError, NotImplementedError):
        return None


def by_keyword(graph: fx.GraphModule, node: fx.Node, values: Values) -> None:
    """All arguments by their names; of a method all but the tensor that it is called on."""
    module = node.op == "call_module"
    key = type(graph.get_submodule(str(node.target))) if module else key_of(node, graph)
    own = int(node.op == "call_method")
    for signature in signatures(key):
        named = dict(zip(signature.places[int(module) + own :], node.args[own:], strict=False)) | node.kwargs
        whole = len(named) + own == len(node.args) + len(node.kwargs)
        if whole and takes(graph, node, values, node.args[:own], named) is not None:
            node.args, node.kwargs = node.args[:own], named
            return


def with_empty(graph: fx.GraphModule, node: fx.Node, values: Values) -> None:
    """Behind its first tensor with channels cut off and put back; beside what it gives for none of them, summed."""
    x = next((n for n in node.all_input_nodes if is_image(values[n])), None)
    if x is None or not isinstance(node.args[:1], tuple):
        return
    with graph.graph.inserting_before(node):
        empty = graph.graph.call_method("narrow", (x, 1, 0, 0))
        values[empty] = values[x].narrow(1, 0, 0)
        whole = graph.graph.call_function(torch.cat, ([empty, x], 1))
        values[whole] = torch.cat([values[empty], values[x]], 1)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: empty if n is x else n)
    found = takes(graph, node, values, args, kwargs)
    node.replace_input_with(x, whole)
    if isinstance(found, Tensor) and found.is_floating_point() and bool(found.sum().isfinite()):
        with graph.graph.inserting_before(node):
            nothing = graph.graph.create_node(node.op, node.target, args, kwargs)
            total = graph.graph.call_method("sum", (nothing,))
            values[nothing], values[total] = found, found.sum()
            added = graph.graph.call_function(torch.add, (whole, total))
            values[added] = values[whole] + found.sum()
        node.replace_input_with(whole, added)


def by_shape(graph: fx.GraphModule, node: fx.Node, values: Values) -> None:
    """Every number among its arguments that is that of its channels is read from its tensor."""
    x = next((n for n in node.all_input_nodes if is_image(values[n])), None)
    if x is None:
        return
    sizes: list[fx.Node] = []

    def read(leaf: Any) -> Any:
        if type(leaf) is not int or leaf != values[x].shape[1]:
            return leaf
        with graph.graph.inserting_before(node):
            shape = graph.graph.call_function(getattr, (x, "shape"))
            sizes.append(graph.graph.call_function(__import__("operator").getitem, (shape, 1)))
        values[shape], values[sizes[-1]] = values[x].shape, values[x].shape[1]
        return sizes[-1]

    args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
    if sizes and takes(graph, node, values, args, kwargs) is not None:
        node.args, node.kwargs = args, kwargs


def is_image(value: Any) -> bool:
    """Whether a value is a tensor with an axis for channels."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] > 0
