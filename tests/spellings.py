"""Other spellings of the calls of a network: arguments by name, empty slices, sizes that are read from a tensor."""

from __future__ import annotations

import copy
import operator
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
Way = Callable[[fx.GraphModule, fx.Node, Values], bool]
REFUSED = (TypeError, ValueError, RuntimeError, IndexError, AssertionError, UserWarning)


def respelled(net: RandomNet, way: Way) -> fx.GraphModule | None:
    """The network with every call that has a rule in another spelling, wherever torch takes that; or None."""
    graph = copy.deepcopy(fxprune.capture(net, net.example()))
    inputs, values, changed = iter(net.example()), Values(), False
    for node in list(graph.graph.nodes):
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            values[node] = getattr(graph.get_submodule(owner), name)
        elif node.op != "output":
            if key_of(node, graph) in RULES:
                changed |= way(graph, node, values)
            values[node] = called(graph, node, *map_arg((node.args, node.kwargs), values.__getitem__))
    return fx.GraphModule(graph, graph.graph).eval() if changed else None


def called(graph: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node gives for other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*args, **kwargs)


def tried(graph: fx.GraphModule, node: fx.Node, values: Values, args: Any, kwargs: Any) -> Any:
    """What a node gives for copies of other arguments, or None where torch refuses them."""
    given = map_arg((args, kwargs), values.__getitem__)
    try:
        return called(graph, node, *pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given))
    except REFUSED:
        return None


def by_keyword(graph: fx.GraphModule, node: fx.Node, values: Values) -> bool:
    """All arguments by their names, the last first; of a method, all but the tensor that it is called on."""
    module = node.op == "call_module"
    if str(node.target).startswith("__"):  # an operator, which is not called by names
        return False
    key = type(graph.get_submodule(str(node.target))) if module else key_of(node, graph)
    own = int(node.op == "call_method")
    for signature in signatures(key):
        named = {**dict(zip(signature.places[module + own :], node.args[own:], strict=False)), **node.kwargs}
        whole = len(named) + own == len(node.args) + len(node.kwargs)
        if whole and tried(graph, node, values, node.args[:own], named) is not None:
            node.args, node.kwargs = node.args[:own], dict(reversed(named.items()))
            return len(named) + own > 1
    return False


def with_empty(graph: fx.GraphModule, node: fx.Node, values: Values) -> bool:
    """No channels in front of those of its first image, and what the call makes of none alone, summed, added to it."""
    x = next((n for n in node.all_input_nodes if is_image(values[n]) and values[n].is_floating_point()), None)
    if x is None or str(getattr(node.target, "__name__", node.target)) == "detach_":  # which takes no views
        return False

    def put(kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made: fx.Node = graph.graph.create_node(kind, target, args, kwargs)
        values[made] = called(graph, made, *map_arg((args, kwargs), values.__getitem__))
        return made

    with graph.graph.inserting_before(node):
        empty = put("call_function", operator.getitem, x, (slice(None), slice(0, 0)))
        whole = put("call_function", torch.cat, [empty, x], 1)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: empty if n is x else n)
        found = tried(graph, node, values, args, kwargs)
        if isinstance(found, Tensor) and found.is_floating_point() and bool(found.sum().isfinite()):
            nothing = put(node.op, node.target, *args, **kwargs)
            whole = put("call_function", torch.add, whole, put("call_method", "sum", nothing))
    node.replace_input_with(x, whole)
    return True


def by_shape(graph: fx.GraphModule, node: fx.Node, values: Values) -> bool:
    """Every number among its arguments that is that of the channels of its first image is read from the shape."""
    x = next((n for n in node.all_input_nodes if is_image(values[n])), None)
    if x is None:
        return False
    with graph.graph.inserting_before(node):
        shape = graph.graph.call_function(getattr, (x, "shape"))
        size = graph.graph.call_function(operator.getitem, (shape, 1))
    values[shape], values[size] = values[x].shape, values[x].shape[1]

    def read(leaf: Any) -> Any:
        return size if type(leaf) is int and leaf == values[size] else leaf

    args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
    if tried(graph, node, values, args, kwargs) is not None:
        node.args, node.kwargs = args, kwargs
    if size.users:
        return True
    graph.graph.erase_node(size)
    graph.graph.erase_node(shape)
    return False


def is_image(value: Any) -> bool:
    """Whether a value is a tensor with an axis for channels."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] > 0
