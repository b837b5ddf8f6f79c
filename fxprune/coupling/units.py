"""From ties to units: connected components of tied labels, and the groups that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxprune.caller.arrays import Flags, Index
from fxprune.coupling.branches import ExpertNodes
from fxprune.coupling.collector import Collector
from fxprune.coupling.experts import (
    clean_branches,
    comparisons_of_experts,
    floors_of,
    is_expert,
    routers_of,
    weights_of,
)
from fxprune.coupling.grids import (
    Classes,
    choose_option,
    components,
    distinct_choices,
    flat_labels,
    label_pairs,
    present_labels,
    units_at,
)
from fxprune.coupling.groups import Branch, Coupling, Edge, Group, Site
from fxprune.coupling.kinds import with_kinds
from fxprune.rules.context import labels_in
from fxprune.rules.vocabulary import ChannelRead, Comparison, Option


def resolve(collector: Collector) -> Coupling:
    """The units, groups and edges that follow from what was collected."""
    branches = clean_branches(collector)
    merged, frozen, compared = _classes(collector)
    groups, sites, unit_of = _grouped(collector, merged, _reasons(collector, merged, np.flatnonzero(frozen)))
    collector.edges += weights_of(compared, collector.edges, merged)
    values = {node.name: value for node, value in collector.env.items()}
    edges = _edges(collector, compared, unit_of, merged)
    read = _with_inexactness(_with_consumers(groups, edges), collector, unit_of)
    return Coupling(
        groups=with_kinds(read, collector, merged, unit_of, branches.values()),
        sites=sites,
        edges=edges,
        unit_of=unit_of,
        merged=merged,
        values=values,
        slots=dict(collector.slots),
        axes=dict(collector.axes),
        remembered=dict(collector.remembered),
        specs={node.name: node.meta["spec"] for node in collector.env},
        pieces=_pieces(values, unit_of, groups),
        statistics=_statistics(collector, unit_of),
        balanced=tuple(collector.balanced),
        larger=tuple(collector.larger),
        floors=floors_of(compared, unit_of),
        branches=tuple(_branch(int(unit_of[expert]), own) for expert, own in branches.items()),
        routers=routers_of(collector, compared, _site_channels(collector, merged), merged),
        even=tuple(
            tuple(units for place in places if (units := units_along(values, unit_of, *place)) is not None)
            for places in collector.limits.even
        ),
    )


def _classes(collector: Collector) -> tuple[Index, Flags, list[Comparison]]:
    """The class of every label once all options are chosen, the frozen classes, and the comparisons of experts."""
    left, right = _tied(collector)
    merged = components(collector.size, left, right)
    compared = comparisons_of_experts(collector, merged)
    frozen = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
    for labels, _ in collector.frozen:
        frozen[merged[present_labels(labels)]] = True
    classes = Classes(merged, frozen)
    for options, ordered in sorted(distinct_choices(collector.choices), key=_first_to_choose):
        choose_option(classes, options, ordered=ordered)
    merged = classes.of(np.arange(collector.size))
    _freeze_summed_weights(collector, frozen, merged)
    _freeze_balanced(collector, frozen, merged)
    return merged, frozen, compared


def _edges(collector: Collector, compared: Sequence[Comparison], unit_of: Index, merged: Index) -> tuple[Edge, ...]:
    """The edges on which units are read, and those on which experts are compared."""
    reads = (
        Edge(r.consumer, r.source, r.dim, units_at(unit_of, flat_labels(r.labels)), r.parameter, r.chosen)
        for r in collector.edges
        if not _passes(r, merged)
    )
    comparisons = (
        Edge(c.consumer.name, c.source.name, c.dim, units_at(unit_of, flat_labels(c.labels)), compared=True)
        for c in compared
    )
    return (*reads, *comparisons)


def _statistics(collector: Collector, unit_of: Index) -> tuple[str, ...]:
    """The nodes that take a statistic over channels of some unit."""
    found = ((name, units_at(unit_of, flat_labels(labels))) for labels, name, _ in collector.statistics)
    return tuple(dict.fromkeys(name for name, units in found if (units >= 0).any()))


def _branch(expert: int, own: ExpertNodes) -> Branch:
    """The branch of an expert, with its nodes by name."""
    return Branch(expert, tuple(node.name for node in own.nodes), {n.name: x.name for n, x in own.through.items()})


def units_along(values: dict[str, Any], unit_of: Index, node: str, output: int, axis: int) -> tuple[int, ...] | None:
    """The unit of each index along an axis of a value, -1 for an index that is always kept.

    None where an index holds several units, so that no single unit removes it.
    """
    planes = labels_in(values[node])[output].along(axis)
    rows = [np.unique(row) for plane in planes for row in units_at(unit_of, plane.slices(axis).long().numpy())]
    size = labels_in(values[node])[output].shape[axis]
    return tuple(int(row[0]) for row in rows) if len(rows) == size and all(len(row) == 1 for row in rows) else None


def _first_to_choose(choice: tuple[Sequence[Option], bool]) -> tuple[bool, int]:
    """The order of choices: heads first, then where most grids meet, because a choice there decides for all of them."""
    options, ordered = choice
    return not ordered, -len(options[0].ties)


def _tied(collector: Collector) -> tuple[Index, Index]:
    """All pairs of tied labels; labels that were to be tied to none are frozen in the collector."""
    none = np.empty(0, dtype=np.int64)
    pairs = [label_pairs(one, other) for one, other, _ in collector.ties]
    a, b = (np.concatenate([none, *(pair[side] for pair in pairs)]) for side in (0, 1))
    alone = (a < 0) != (b < 0)
    nodes = np.repeat(np.arange(len(pairs)), [len(left) for left, _ in pairs])[alone]
    lonely = np.maximum(a, b)[alone]
    for index in np.unique(nodes).tolist():
        reason = f"meets values without channels in {collector.described(collector.ties[index][2])}"
        collector.frozen.append((torch.from_numpy(lonely[nodes == index]), reason))
    both = (a >= 0) & (b >= 0)
    return a[both], b[both]


def _passes(reading: ChannelRead, merged: Index) -> bool:
    """Whether an edge reads nothing of its own.

    Each channel becomes one that it is tied to (a depthwise convolution), or no whole slices of this axis are removed.
    """
    if reading.across is not None:
        across = np.where(reading.across.numpy() < 0, -1, merged[reading.across.numpy().astype(np.int64)])
        return bool((across != across[:, :1]).any())
    if reading.through is None:
        return False
    labels, through = flat_labels(reading.labels), flat_labels(reading.through)
    return bool((labels >= 0).all()) and np.array_equal(merged[labels], merged[through])


def _freeze_summed_weights(collector: Collector, frozen: Flags, merged: Index) -> None:
    """Freeze channels of activations over which a product of weights sums: it does not read them as zero."""
    live = np.zeros(len(frozen) + 1, dtype=bool)
    for r in collector.edges:
        live[merged[present_labels(r.labels)]] |= collector.is_live(r.source)
    nodes = {node.name: node for node in collector.graph.graph.nodes}
    for r in collector.edges:
        labels = (
            np.empty(0, dtype=np.int64)
            if collector.is_live(r.source)
            else present_labels(r.labels if r.across is None else r.across)
        )
        shared = labels[live[merged[labels]]]
        if len(shared):
            reason = f"{collector.described(nodes[r.consumer])} takes a statistic over the channels of a weight"
            collector.frozen.append((torch.from_numpy(shared), reason))
            frozen[merged[shared]] = True


def _freeze_balanced(collector: Collector, frozen: Flags, merged: Index) -> None:
    """Freeze layers that must be as wide as a frozen one, in the collector and in `frozen`."""
    channels = _site_channels(collector, merged)
    classes = {name: merged[labels[labels >= 0]] for name, labels in channels.items()}
    sets = list(collector.balanced)
    while held := next((names for names in sets if any(frozen[classes[name]].all() for name in names)), None):
        sets.remove(held)
        whole = next(name for name in held if frozen[classes[name]].all())
        for name in held:
            reason = f"must be as wide as {whole}, which is frozen"
            if not frozen[classes[name]].all():
                collector.frozen.append((torch.from_numpy(channels[name]), reason))
                frozen[classes[name]] = True


def _reasons(collector: Collector, merged: Index, stays: Index) -> tuple[Index, list[str]]:
    """For each class of tied labels the number of the first reason to freeze it (-1: none), and the reasons."""
    names = dict.fromkeys(
        [*(reason for _, reason in collector.frozen), "a grouped layer keeps every slot of its groups"]
    )
    numbers = {reason: index for index, reason in enumerate(names)}
    reasons = np.full(merged.max(initial=-1) + 1, -1, dtype=np.int64)
    reasons[stays[stays < len(reasons)]] = len(names) - 1
    for labels, reason in reversed(collector.frozen):
        reasons[merged[present_labels(labels)]] = numbers[reason]
    return reasons, list(names)


def _grouped(
    collector: Collector, merged: Index, why: tuple[Index, list[str]]
) -> tuple[tuple[Group, ...], tuple[Site, ...], Index]:
    """Form a group of the classes connected by the sites that produce them, with consecutive unit numbers.

    Returns the groups, prunable ones first, the sites, and the unit of every label, -1 for frozen ones.
    """
    channels = _site_channels(collector, merged)
    reasons, texts = why
    number = np.full(len(reasons) + 1, -1, dtype=np.int64)
    drafts: list[tuple[tuple[str, ...], range, str | None]] = []
    count = free = 0
    for names, classes, reason in _connected(channels, merged, reasons):
        drafts.append((names, range(count, count + len(classes)), texts[reason] if reason >= 0 else None))
        number[classes] = np.arange(count, count + len(classes))
        count += len(classes)
        free += len(classes) if reason < 0 else 0
    every = number[merged]
    sites = {name: Site(name, units_at(every, labels)) for name, labels in channels.items()}
    groups = _named_groups(drafts, sites)
    prunable = tuple(Site(site.name, np.where(site.units < free, site.units, -1)) for site in sites.values())
    return groups, prunable, np.where(every < free, every, -1)


def _connected(channels: dict[str, Index], merged: Index, reasons: Index) -> list[tuple[tuple[str, ...], Index, int]]:
    """Connected classes of tied labels, with their sites and the reason why they are frozen, or -1.

    Frozen classes are connected only to those frozen for the same reason.
    """
    names, fates = list(channels), reasons.max(initial=-1) + 2
    produced = [np.unique(merged[labels[labels >= 0]]) for labels in channels.values()]
    classes = np.concatenate([np.empty(0, dtype=np.int64), *produced])
    holders = np.repeat(np.arange(len(names)), [len(part) for part in produced])
    nodes = len(reasons) + holders * fates + reasons[classes] + 1
    parts = components(len(reasons) + len(names) * fates, classes, nodes)[classes]
    order = np.argsort(parts, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(parts[order])) + 1)
    found = []
    for member in members if len(classes) else []:
        sites = tuple(names[index] for index in np.unique(holders[member]))
        found.append((sites, np.unique(classes[member]), int(reasons[classes[member[0]]])))
    rank = {name: index for index, name in enumerate(names)}
    return sorted(found, key=lambda item: (item[2] >= 0, rank[item[0][0]], int(item[1][0])))


def _site_channels(collector: Collector, merged: Index) -> dict[str, Index]:
    """Site -> the labels of its channels, in order; a layer that is called twice counts once.

    Stacked weights produce the channels of their experts, not the experts, which their router does.
    """
    experts = np.append(is_expert(collector, merged), False)[np.append(merged, -1)]  # of labels, -1 for none
    channels: dict[str, list[Index]] = {}
    for labels, name in collector.produced:
        vector = flat_labels(labels)
        vector = vector if experts[vector].all() else vector[~experts[vector]]
        known = channels.setdefault(name, [])
        if not any(np.array_equal(vector, other) for other in known):
            known.append(vector)
    return {name: np.concatenate(parts) for name, parts in channels.items()}


def _named_groups(drafts: list[tuple[tuple[str, ...], range, str | None]], sites: dict[str, Site]) -> tuple[Group, ...]:
    """Groups named after their first site; a number tells those apart that share it."""
    groups, used = [], dict.fromkeys(sites, 0)
    for names, units, reason in drafts:
        used[names[0]] += 1
        suffix = f"#{used[names[0]]}" if used[names[0]] > 1 else ""
        groups.append(Group(names[0] + suffix, units, tuple(sites[name] for name in names), (), reason))
    return tuple(groups)


def _with_consumers(groups: tuple[Group, ...], edges: tuple[Edge, ...]) -> tuple[Group, ...]:
    """The groups, with the nodes that read them."""
    owner = _owners(groups)
    readers: dict[int, dict[str, None]] = {}
    for edge in edges:
        for index in np.unique(owner[edge.units[edge.units >= 0]]).tolist():
            readers.setdefault(index, {})[edge.consumer] = None
    return tuple(replace(group, consumers=tuple(readers.get(index, ()))) for index, group in enumerate(groups))


def _with_inexactness(groups: tuple[Group, ...], collector: Collector, unit_of: Index) -> tuple[Group, ...]:
    """The groups, with the first statistic that changes when their units are removed."""
    owner = _owners(groups)
    reasons: dict[int, str] = {}
    for labels, _, reason in collector.statistics:
        units = units_at(unit_of, flat_labels(labels))
        for index in np.unique(owner[units[units >= 0]]).tolist():
            reasons.setdefault(index, reason)
    return tuple(replace(group, inexact=reasons.get(index)) for index, group in enumerate(groups))


def _owners(groups: tuple[Group, ...]) -> Index:
    """The number of the group of each unit."""
    return np.repeat(np.arange(len(groups)), [len(group) for group in groups])


def _pieces(values: dict[str, Any], unit_of: Index, groups: tuple[Group, ...]) -> tuple[Index, ...]:
    """The distinct sets of units that make up a whole axis of some value, without those that contain a whole group.

    (Every group keeps at least one unit.)
    """
    owner, sizes = _owners(groups), np.array([len(group) for group in groups])
    cores = {id(plane.core): plane.core for value in labels_in(tuple(values.values())) for plane in value.planes}
    pieces: dict[bytes, Index] = {}
    seen: set[bytes] = set()
    for core in cores.values():
        numbers = flat_labels(core)
        if numbers.tobytes() in seen:
            continue
        seen.add(numbers.tobytes())
        units = np.unique(units_at(unit_of, numbers))
        if len(units) and units[0] >= 0 and (np.bincount(owner[units], minlength=len(sizes)) < sizes).all():
            pieces.setdefault(units.tobytes(), units)
    return tuple(pieces.values())
