"""The layers of a graph, and what each costs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxprune.reporting.records import LayerReport
from fxprune.tracing.graph import ModelGraph

WHOLE = "(model)"  # holds the parameters that lie in no layer
LARGEST = 12  # layers in a report, by parameters and by MACs


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Parameters, MACs per sample and types of a graph's layers, by name; `total` is the MACs of the whole graph."""

    params: Counter[str]
    macs: Counter[str]
    kinds: dict[str, str]
    total: int


def layer_costs(graph: ModelGraph, flops: Mapping[str, int], samples: int) -> LayerCosts:
    """The costs of each layer of a graph whose nodes take these flops on so many samples.

    A layer's MACs are those of the calls of its module, or of functions on its weights.
    """
    params = layer_parameters(graph)
    kinds = {name: type(module).__name__ for name, module in graph.named_modules(remove_duplicate=False)}
    work = Counter[str]()
    for node in graph.graph.nodes:
        name = layer_of(graph, node)
        work[name] += flops[node.name]
        kinds[name] = kind_of(graph, node) if node.op == "call_module" else kinds.get(name, kind_of(graph, node))
    twice = 2 * samples
    macs = Counter({name: count // twice for name, count in work.items() if count})
    return LayerCosts(params, macs, kinds | {WHOLE: type(graph).__name__}, work.total() // twice)


def layer_parameters(graph: nn.Module) -> Counter[str]:
    """The number of parameters of every layer; a shared one counts for the first layer that has it."""
    counts = Counter[str]()
    for name, parameter in graph.named_parameters():
        counts[name.rpartition(".")[0] or WHOLE] += parameter.numel()
    return counts


def largest(before: LayerCosts, after: LayerCosts) -> tuple[LayerReport, ...]:
    """The layers with the most parameters and those with the most MACs after pruning; most MACs first."""
    names = {name for counts in (after.params, after.macs) for name, _ in counts.most_common(LARGEST)}
    found = [
        LayerReport(
            name, after.kinds[name], (before.params[name], after.params[name]), (before.macs[name], after.macs[name])
        )
        for name in names
    ]
    return tuple(sorted(found, key=lambda layer: (-layer.macs[1], -layer.params[1], layer.name)))


def layer_of(graph: ModelGraph, node: fx.Node) -> str:
    """The layer of a node: the module that it calls, the one whose weight it reads, or else its own name."""
    if node.op == "call_module":
        return str(node.target)
    for source in node.all_input_nodes:
        if source.op == "get_attr" and isinstance(attribute_of(graph, source), nn.Parameter):
            return str(source.target).rpartition(".")[0] or WHOLE
    return node.name


def kind_of(graph: ModelGraph, node: fx.Node) -> str:
    """The kind of a node: the type of its module, marked if depthwise, or the name of its function."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        groups = getattr(module, "groups", 1)
        depthwise = isinstance(groups, int) and groups > 1 and groups == getattr(module, "in_channels", 0)
        return f"depthwise {type(module).__name__}" if depthwise else type(module).__name__
    return str(getattr(node.target, "__name__", node.target))


def attribute_of(graph: ModelGraph, node: fx.Node) -> object:
    """The attribute that a get_attr node reads."""
    return operator.attrgetter(str(node.target))(graph)
