"""Coupling: which channels of which layers live or die together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from fxprune.capture import ModelGraph
from fxprune.capture.checks import listed
from fxprune.collect import EXCLUDED, Collector, Exclude
from fxprune.errors import CaptureError, FxpruneError, first_line
from fxprune.groups import Coupling, Edge, Group, Index, Site
from fxprune.numberless import computing, lacking_numbers
from fxprune.resolve import resolve
from fxprune.rules.table import RULES
from fxprune.walk import Unknown, step

__all__ = ["EXCLUDED", "Coupling", "Edge", "Exclude", "Group", "Index", "Site", "analyse", "couple"]


def couple(
    graph: ModelGraph,
    *,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
) -> tuple[Group, ...]:
    """The groups of coupled channels of a captured graph, prunable ones and frozen ones.

    Args:
        graph: what `capture` returned.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.
        inexact: also let channels go over which a statistic is taken (LayerNorm, say): it changes with them.
        head_dim: of attention, let the same places of every head go in place of whole heads.

    Raises:
        UnsupportedOpError: an operation has no rule.
        FxpruneError: an entry of `exclude` matches nothing.

    >>> from torch import nn
    >>> from fxprune.capture import capture
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> for group in couple(capture(net, torch.zeros(2, 4))):
    ...     print(group)
    0: 3 units, prunable
      0: 3 of 3 channels
      read by _2
    2: 2 units, frozen: it is the model's output
      2: 2 of 2 channels
    """
    return analyse(graph, exclude=exclude, unknown=unknown, inexact=inexact, head_dim=head_dim).groups


def analyse(
    graph: ModelGraph,
    *,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
) -> Coupling:
    """Everything behind `couple`: groups, sites, edges, and the labels that rewriting and verifying need.

    A graph that did not change since is not looked at twice: scoring, rewriting and verifying share what was found.
    """
    state, tensors = _as_it_stands(graph)
    if graph not in _KNOWN or _KNOWN[graph].state != state:
        _KNOWN[graph] = _Known(state, tensors)
    known, options = _KNOWN[graph].couplings, (listed(exclude), inexact, head_dim)
    if (options, unknown) not in known:
        found = analyse_anew(graph, exclude=exclude, unknown=unknown, inexact=inexact, head_dim=head_dim)
        known |= {(options, "freeze"): found, (options, unknown): found}
    return known[options, unknown]


def analyse_anew(
    graph: ModelGraph,
    *,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
) -> Coupling:
    """What `analyse` gives, found in the graph itself, whatever is known of it."""
    collector = Collector(graph, exclude, inexact=inexact, head_dim=head_dim)
    with torch.no_grad(), computing():
        for node in graph.graph.nodes:
            with explained(collector, node):
                collector.env[node] = step(collector, node, unknown=unknown)
            collector.freeze_excluded(node)
    collector.check_exclude()
    with computing():
        return resolve(collector)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What was found of a graph in one state, by options. Its tensors are held, so that no other takes their place."""

    state: Hashable
    tensors: tuple[Tensor, ...]
    couplings: dict[Hashable, Coupling] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[ModelGraph, _Known] = WeakKeyDictionary()
_PLAIN = (bool, int, float, str, tuple)


def _as_it_stands(graph: ModelGraph) -> tuple[Hashable, tuple[Tensor, ...]]:
    """All that coupling looks at: the rules, nodes, options of modules, and tensors with how often each changed."""
    nodes = [(node.name, node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.graph.nodes]
    modules, names, tensors = [], [], []
    for path, module in graph.named_modules(remove_duplicate=False):
        options = [(k, v) for k, v in vars(module).items() if type(v) in _PLAIN and k != "training"]
        modules.append((path, type(module) if path else None, str(options)))  # the graph's own class must go with it
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.append(f"{path}.{name}")
                tensors.append(tensor)
    ages = [(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
    return (tuple(RULES.items()), tuple(nodes), tuple(modules), tuple(names), tuple(ages)), tuple(tensors)


@contextmanager
def explained(collector: Collector, node: fx.Node) -> Iterator[None]:
    """Say what is missing where labels cannot be found since a constant of the model has no numbers."""
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        model, name = collector.graph, lacking_numbers(collector.graph)
        if name is None:
            raise
        raise CaptureError(
            f"{collector.describe()} of {type(model).__name__} moves channels by constants without numbers "
            f"({type(error).__name__}: {first_line(error)}): build the buffers and tensors that the forward indexes by "
            "on the CPU; only parameters may be on the meta device"
        ) from error
