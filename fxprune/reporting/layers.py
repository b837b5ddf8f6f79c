"""The layers of a graph, and what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxprune.caller.tensors import attribute_at
from fxprune.reporting.records import LayerReport
from fxprune.tracing.graph import ModelGraph

WHOLE = "(model)"  # the name of what holds parameters that lie in no layer
LARGEST = 12  # layers that a report keeps, by parameters and by MACs


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Parameters, multiply-accumulates a sample and types of the layers of one graph, by name; `total` is all work."""

    params: Counter[str]
    macs: Counter[str]
    kinds: dict[str, str]
    total: int


def layer_costs(graph: ModelGraph, flops: Mapping[str, int], samples: int) -> LayerCosts:
    """What each layer of a graph costs, whose nodes take these flops on so many samples.

    Work is counted where a module is called, or its weight read by a function.
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
    """The number of parameters of every layer, shared ones counted where they come first."""
    counts = Counter[str]()
    for name, parameter in graph.named_parameters():
        counts[name.rpartition(".")[0] or WHOLE] += parameter.numel()
    return counts


def largest(before: LayerCosts, after: LayerCosts) -> tuple[LayerReport, ...]:
    """The layers of a graph that have the most parameters, and those that have the most work; most work first."""
    names = {name for counts in (after.params, after.macs) for name, _ in counts.most_common(LARGEST)}
    found = [
        LayerReport(
            name, after.kinds[name], (before.params[name], after.params[name]), (before.macs[name], after.macs[name])
        )
        for name in names
    ]
    return tuple(sorted(found, key=lambda layer: (-layer.macs[1], -layer.params[1], layer.name)))


def layer_of(graph: ModelGraph, node: fx.Node) -> str:
    """The module that a node calls, the one whose weight it reads, or else its own name."""
    if node.op == "call_module":
        return str(node.target)
    for source in node.all_input_nodes:
        if source.op == "get_attr" and isinstance(attribute_at(graph, str(source.target)), nn.Parameter):
            return str(source.target).rpartition(".")[0] or WHOLE
    return node.name


def kind_of(graph: ModelGraph, node: fx.Node) -> str:
    """What a node is called by: the type of its module, depthwise ones told apart, or the name of its function."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        groups = getattr(module, "groups", 1)
        depthwise = isinstance(groups, int) and groups > 1 and groups == getattr(module, "in_channels", 0)
        return f"depthwise {type(module).__name__}" if depthwise else type(module).__name__
    return str(getattr(node.target, "__name__", node.target))
