"""Experts: the branches that work for one alone, where a router compares them, and how many of them are kept."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from fxprune.caller.arrays import Flags, Index
from fxprune.caller.example import TensorSpec
from fxprune.coupling.branches import ExpertNodes, branches_of
from fxprune.coupling.collector import Collector
from fxprune.coupling.grids import flat_labels, present_labels, units_at
from fxprune.coupling.groups import Router
from fxprune.rules.vocabulary import ChannelRead, Comparison
from fxprune.tracing.dependence import name_of


def clean_branches(collector: Collector) -> dict[int, ExpertNodes]:
    """The branches of experts that can be left out; those of others freeze their expert in the collector.

    Slices of stacked weights that are used in one branch alone are tied to its expert.
    """
    found = branches_of(collector.graph, collector.told)
    for expert, branch in found.items():
        if branch.leak is not None:
            where = collector.described(branch.leak)
            collector.frozen.append((torch.tensor([float(expert)]), f"told apart by number, and used by {where}"))
    clean = {expert: branch for expert, branch in found.items() if branch.leak is None}
    owner = {node: expert for expert, branch in clean.items() for node in branch.nodes}
    for node, label, reason in collector.taken:
        if node in owner:
            collector.ties.append((label, torch.tensor([owner[node]], dtype=label.dtype), node))
        else:
            collector.freeze(label, reason)
    return clean


def is_expert(collector: Collector, merged: Index) -> Flags:
    """Which classes of tied labels are experts."""
    experts = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
    for labels in collector.experts:
        experts[merged[present_labels(labels)]] = True
    return experts


def comparisons_of_experts(collector: Collector, merged: Index) -> list[Comparison]:
    """The comparisons of experts; the channels of all others are frozen, or removed inexactly, in the collector."""
    experts, found = is_expert(collector, merged), list[Comparison]()
    for c in collector.comparisons:
        if experts[merged[present_labels(c.labels)]].all():
            found.append(c)
        elif c.statistic and collector.allow_inexact:
            collector.statistics.append((c.labels, c.consumer.name, c.reason))
        else:
            collector.freeze(c.labels, c.reason)
    return found


def floors_of(compared: Sequence[Comparison], unit_of: Index) -> tuple[tuple[Index, int], ...]:
    """The sets of units of which some are kept at least, because so many are chosen at once, with frozen ones."""
    found: dict[bytes, tuple[Index, int]] = {}
    for c in compared:
        units = np.unique(units_at(unit_of, flat_labels(c.labels)))
        always = int((units_at(unit_of, flat_labels(c.labels)) < 0).sum())
        least, units = c.least - always, units[units >= 0]
        key = units.tobytes()
        if least > int(not always) and len(units) and least > found.get(key, (units, 0))[1]:
            found[key] = units, least
    return tuple(found.values())


def routers_of(
    collector: Collector, compared: Sequence[Comparison], channels: Mapping[str, Index], merged: Index
) -> tuple[Router, ...]:
    """The layers that produce experts, among the labels of all sites, and how many experts are chosen at once."""
    reads = [r for r in collector.edges if r.chosen is not None]
    found = []
    for name, labels in channels.items():
        own = merged[labels[labels >= 0]]
        chosen = [c.least for c in compared if np.isin(merged[present_labels(c.labels)], own).all()]
        keys = [(r.source, str(r.dim)) for r in reads if np.isin(merged[present_labels(r.labels)], own).all()]
        if chosen:
            found.append(Router(name, max(chosen), next(iter(keys), None)))
    return tuple(found)


def weights_of(compared: Sequence[Comparison], reads: Sequence[ChannelRead], merged: Index) -> Iterator[ChannelRead]:
    """Reads of the weights of chosen experts, which show how these are used, for experts that nothing else reads.

    `merged` are the classes of tied labels.
    """
    none = np.empty(0, dtype=np.int64)
    known = merged[np.concatenate([none, *(present_labels(read.labels) for read in reads)])]
    routers: dict[bytes, list[Comparison]] = {}
    for choice in compared:
        own = np.unique(merged[present_labels(choice.labels)])
        if not np.isin(own, known).any():
            routers.setdefault(own.tobytes(), []).append(choice)
    for choices in routers.values():
        yield from next(filter(None, (_reads(choice, choices) for choice in choices)), [])


def _reads(choice: Comparison, others: Sequence[Comparison]) -> list[ChannelRead]:
    """The reads of the weights of experts whose numbers a choice gives; others of the same experts may give values."""
    own = choice.consumer
    numbers = own if name_of(own) == "argmax" else _part(own, "indices", 1)
    if numbers is None:
        return []
    values = [_part(other.consumer, "values", 0) for other in others]
    values += [user for user in numbers.users if name_of(user) == "gather"]
    fitting = [node for node in values if node is not None and _shape(node) == _shape(numbers)]
    last = _settled(fitting[0]) if fitting else None
    users = last.users if last is not None else ()
    return [ChannelRead(user.name, last.name, 1, choice.labels, chosen=numbers.name) for user in users if last]


def _part(choice: fx.Node, name: str, place: int) -> fx.Node | None:
    """The node that takes the values, or the numbers, out of the result of a choice."""
    parts = [(operator.getitem, place), (getattr, name)]  # a slice cannot be in a set
    return next((user for user in choice.users if len(user.args) == 2 and (user.target, user.args[1]) in parts), None)


def _settled(values: fx.Node) -> fx.Node:
    """The last of the nodes that turn the values of a choice into weights, one for each, such as a softmax."""
    while True:
        following = [user for user in values.users if _like(user, values)]
        if not following:
            return values
        values = following[-1]


def _like(node: fx.Node, values: fx.Node) -> bool:
    """Whether a node's value has the shape of `values`, and no other input has."""
    spec, own = node.meta["spec"], values.meta["spec"]
    others = [source for source in node.all_input_nodes if source is not values]
    same = isinstance(spec, TensorSpec) and spec.shape == own.shape and spec.dtype.is_floating_point
    return same and all(_shape(other) != own.shape for other in others)


def _shape(node: fx.Node) -> object:
    return getattr(node.meta["spec"], "shape", None)
