"""Coupling: which channels of which layers live or die together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from fxprune.capture import ModelGraph
from fxprune.errors import FxpruneError
from fxprune.labels import NO_CHANNEL, varying_axes
from fxprune.rules.context import Context, Option, Slot, labels_in
from fxprune.walk import Unknown, step

Index = NDArray[np.int64]
Exclude = Sequence[str | type[nn.Module]]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A layer's channels: `units[i]` is the unit that channel i belongs to, or -1 where the channel always stays."""

    name: str
    units: Index

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.units)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Units of one kind: the same layers produce the channels of each, so that they can be ranked against each other.

    `units` are the numbers of the units (consecutive ones), `sites` the layers that produce their channels,
    `consumers` the nodes that read them. `frozen` says why the group stays whole, or is None.
    """

    name: str
    units: range
    sites: tuple[Site, ...]
    consumers: tuple[str, ...]
    frozen: str | None = None

    def __len__(self) -> int:
        return len(self.units)

    def channels(self, site: Site) -> int:
        """How many channels of `site` belong to this group."""
        return int(np.isin(site.units, self.units).sum())

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "prunable"
        lines = [f"{self.name}: {len(self)} units, {state}"]
        lines += [f"  {site.name}: {self.channels(site)} of {site.width} channels" for site in self.sites]
        if self.consumers:
            lines.append(f"  read by {', '.join(self.consumers)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """Node `consumer` reads, along axis `dim` of what node `source` gives, channels of the units `units` (-1: none)."""

    consumer: str
    source: str
    dim: int
    units: Index


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """All that the label interpreter finds out about a graph.

    `unit_of` maps labels to units (-1: always stays), `merged` to classes of tied labels. `values` holds the label
    values of all nodes, `axes` the axes of their planes, `specs` their shapes on the example; `slots` the first label
    and the size of every slot. `pieces` are the sets of units that are all that some tensor has along an axis, so that
    one of each has to stay.
    """

    groups: tuple[Group, ...]
    sites: tuple[Site, ...]
    edges: tuple[Edge, ...]
    unit_of: Index
    merged: Index
    values: dict[str, Any]
    slots: dict[Slot, tuple[int, int]]
    axes: dict[tuple[str, int, int], tuple[int, ...]]
    specs: dict[str, Any]
    pieces: tuple[Index, ...]

    @property
    def units(self) -> int:
        """The number of units that may be pruned."""
        return sum(len(group) for group in self.groups if group.frozen is None)

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may be pruned."""
        return tuple(group for group in self.groups if group.frozen is None)

    def graph(self) -> nx.Graph:
        """The bipartite graph of groups and the sites that produce their channels."""
        net: nx.Graph = nx.Graph()
        for group in self.groups:
            net.add_node(group.name, kind="group", size=len(group), frozen=group.frozen)
            for site in group.sites:
                net.add_node(f"site {site.name}", kind="site", width=site.width)
                net.add_edge(group.name, f"site {site.name}", channels=group.channels(site))
        return net


def couple(graph: ModelGraph, *, exclude: Exclude = (), unknown: Unknown = "error") -> tuple[Group, ...]:
    """The groups of coupled channels of a captured graph, prunable ones and frozen ones.

    Args:
        graph: what `capture` returned.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.

    Raises:
        UnsupportedOpError: an operation has no rule.
        FxpruneError: an entry of `exclude` matches nothing.

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
    return analyse(graph, exclude=exclude, unknown=unknown).groups


def analyse(graph: ModelGraph, *, exclude: Exclude = (), unknown: Unknown = "error") -> Coupling:
    """Everything behind `couple`: groups, sites, edges, and the labels that rewriting and verifying need."""
    collector = Collector(graph, exclude)
    with torch.no_grad():
        for node in graph.graph.nodes:
            collector.env[node] = step(collector, node, unknown=unknown)
            collector.freeze_excluded(node)
    collector.check_exclude()
    return _resolve(collector)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """An edge as a rule states it, in labels."""

    consumer: str
    source: str
    dim: int
    labels: Tensor
    through: Tensor | None

    def passes(self, merged: Index) -> bool:
        """Whether every channel is turned into one that it is tied to."""
        if self.through is None or bool((self.labels == NO_CHANNEL).any()):
            return False
        return np.array_equal(merged[_array([self.labels])], merged[_array([self.through])])


class Collector(Context):
    """The pass that hands out labels and gathers what the rules say of them."""

    def __init__(self, graph: ModelGraph, exclude: Exclude = ()) -> None:
        super().__init__(graph)
        self.exclude = exclude
        self.matched: set[int] = set()
        self.size = 0
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.choices: list[Sequence[Option]] = []
        self.produced: list[tuple[Tensor, str]] = []
        self.edges: list[_Reading] = []
        self.slots: dict[Slot, tuple[int, int]] = {}
        self.axes: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def tie(self, a: Tensor, b: Tensor) -> None:
        both, alone = _pairs(a, b)
        self.ties.append(both)
        self.freeze(alone, f"meets values without channels in {self.describe()}")

    def freeze(self, labels: Tensor, reason: str) -> None:
        if labels.numel():
            self.frozen.append((labels.reshape(-1), reason))

    def choose(self, options: Sequence[Option]) -> None:
        self.choices.append(options)

    def produce(self, labels: Tensor, site: str) -> None:
        self.produced.append((labels.reshape(-1), site))
        if any(self._matches(pattern, site) for pattern in range(len(self.exclude))):
            self.freeze(labels, "excluded by the caller")

    def edge(self, source: fx.Node, dim: int, labels: Tensor, through: Tensor | None) -> None:
        self.edges.append(_Reading(self.node.name, source.name, dim, labels, through))

    def fresh(self, slot: Slot, size: int) -> Tensor:
        if slot not in self.slots:
            self.slots[slot] = self.size, size
            self.size += size
        start, length = self.slots[slot]
        return torch.arange(start, start + length, dtype=torch.float64)

    def grouped(self, groups: int) -> bool:
        if groups > 1:
            self.slots[Slot(self.node.name, "groups")] = self.size, 0
        return groups > 1

    def slot_axes(self, owner: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis for axis, size in enumerate(shape) if size > 1)

    def axes_of(self, tensor: Tensor, output: int, plane: int) -> tuple[int, ...]:
        axes = varying_axes(tensor)
        self.axes[self.node.name, output, plane] = axes
        return axes

    def freeze_excluded(self, node: fx.Node) -> None:
        """Freeze the outputs of a module that the caller excluded."""
        if node.op == "call_module" and any(self._matches(i, str(node.target)) for i in range(len(self.exclude))):
            self.opaque("excluded by the caller", self.env[node])

    def _matches(self, index: int, path: str) -> bool:
        """Whether entry `index` of `exclude` names the module at `path` or one that holds it."""
        pattern, parts = self.exclude[index], path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if isinstance(pattern, str):
                hit = fnmatchcase(name, pattern)
            else:
                hit = isinstance(_submodule(self.graph, name), pattern)
            if hit:
                self.matched.add(index)
                return True
        return False

    def check_exclude(self) -> None:
        """Raise where an entry of `exclude` matched no layer."""
        names = [name for name, _ in self.graph.named_modules()]
        for index, entry in enumerate(self.exclude):
            known = isinstance(entry, str) and any(fnmatchcase(name, entry) for name in names)
            if index not in self.matched and not known and isinstance(entry, str):
                raise FxpruneError(
                    f"exclude names {entry!r}, but no module of {type(self.graph).__name__} is called so"
                )


def _submodule(graph: nn.Module, name: str) -> nn.Module | None:
    try:
        return graph.get_submodule(name)
    except AttributeError:
        return None


def _pairs(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two label tensors, broadcast: the pairs of labels, and the labels whose partner is none."""
    a, b = (t.reshape(-1) for t in torch.broadcast_tensors(a, b))
    left, right = a != NO_CHANNEL, b != NO_CHANNEL
    both = left & right
    return (a[both], b[both]), torch.cat([a[left & ~right], b[right & ~left]])


def _array(parts: Iterable[Tensor]) -> Index:
    """Label tensors joined into one integer array, none left out."""
    joined = torch.cat([torch.empty(0, dtype=torch.float64), *(part.reshape(-1) for part in parts)])
    return joined[joined != NO_CHANNEL].to(torch.int64).numpy()


def _components(size: int, a: Index, b: Index) -> Index:
    """Connected components of `size` nodes under the edges (a[i], b[i])."""
    edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(size, size))
    parts: Index = connected_components(edges, directed=False)[1].astype(np.int64)
    return parts


def _resolve(collector: Collector) -> Coupling:
    """From what was collected to units and groups."""
    size = collector.size
    merged = _components(size, _array(a for a, _ in collector.ties), _array(b for _, b in collector.ties))
    frozen = np.zeros(merged.max(initial=-1) + 1, dtype=bool)
    frozen[merged[_array(labels for labels, _ in collector.frozen)]] = True
    united = np.arange(len(frozen))
    for options in collector.choices:
        _choose(united, frozen, merged, options)
    merged, stays = united[merged], np.flatnonzero(frozen)
    reasons = _reasons(collector, merged, stays)
    groups, sites, unit_of = _grouped(collector, merged, reasons)
    edges = tuple(
        Edge(reading.consumer, reading.source, reading.dim, _units_at(unit_of, reading.labels))
        for reading in collector.edges
        if not reading.passes(merged)
    )
    values = {node.name: value for node, value in collector.env.items()}
    specs = {node.name: node.meta["spec"] for node in collector.env}
    groups = _with_consumers(groups, edges)
    return Coupling(
        groups,
        sites,
        edges,
        unit_of,
        merged,
        values,
        dict(collector.slots),
        dict(collector.axes),
        specs,
        _pieces(values, unit_of),
    )


def _choose(united: Index, frozen: NDArray[np.bool_], merged: Index, options: Sequence[Option]) -> None:
    """Apply the option that leaves the most units free to go, the first of equals.

    `merged` maps labels to classes; `united`, which maps classes to the classes that they were united with, and
    `frozen`, which tells the classes that stay, are brought up to date in place.
    """
    trials = [_trial(united, frozen, merged, option) for option in options]
    _, touched, roots, held = max(trials, key=lambda trial: trial[0])
    frozen[held] = True
    stuck = np.unique(roots[frozen[touched]])
    renamed = np.arange(len(united))
    renamed[touched] = roots
    united[:] = renamed[united]
    frozen[stuck] = True


def _trial(united: Index, frozen: NDArray[np.bool_], merged: Index, option: Option) -> tuple[int, Index, Index, Index]:
    """How many free units an option leaves, the classes that it touches and unites with which, and those it holds."""
    pairs = [_pairs(a, b) for a, b in option.ties]
    a, b = (united[merged[_array(pair[0][side] for pair in pairs)]] for side in (0, 1))
    held = united[merged[_array([*option.stays, *(alone for _, alone in pairs)])]]
    touched, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    parts = _components(len(touched), inverse[: len(a)], inverse[len(a) :])
    stuck = frozen[touched] | np.isin(touched, held)
    _, first = np.unique(parts, return_index=True)
    return len(first) - len(np.unique(parts[stuck])), touched, touched[first][parts], held


def _reasons(collector: Collector, merged: Index, stays: Index) -> dict[int, str]:
    """Class of tied labels -> why it stays: the first reason given."""
    reasons: dict[int, str] = {}
    for labels, reason in collector.frozen:
        for tied in np.unique(merged[_array([labels])]):
            reasons.setdefault(int(tied), reason)
    for tied in stays:
        reasons.setdefault(int(tied), "a grouped layer keeps every slot of its groups")
    return reasons


def _grouped(
    collector: Collector, merged: Index, reasons: dict[int, str]
) -> tuple[tuple[Group, ...], tuple[Site, ...], Index]:
    """Classes with the same producing sites and the same fate form a group; its units get consecutive numbers."""
    channels = _site_channels(collector)
    producers: dict[int, dict[str, None]] = {}
    for name, labels in channels.items():
        for tied in np.unique(merged[labels[labels >= 0]]).tolist():
            producers.setdefault(tied, {})[name] = None
    members: dict[tuple[tuple[str, ...], str | None], list[int]] = {}
    for tied, names in producers.items():
        members.setdefault((tuple(names), reasons.get(tied)), []).append(tied)
    number = np.full(len(merged) + 1, -1, dtype=np.int64)
    ranges, count = [], 0
    for _, ties in sorted(members.items(), key=lambda item: item[0][1] is not None):
        ranges.append(range(count, count + len(ties)))
        number[ties] = np.arange(count, count + len(ties))
        count += len(ties)
    every = number[merged] if len(merged) else number[:0]
    last_free = sum(len(ties) for (_, reason), ties in members.items() if reason is None)
    sites = tuple(Site(name, _units_at(every, torch.from_numpy(labels))) for name, labels in channels.items())
    groups = _named_groups(members, ranges, {site.name: site for site in sites})
    free = tuple(Site(site.name, np.where(site.units < last_free, site.units, -1)) for site in sites)
    return groups, free, np.where(every < last_free, every, -1)


def _site_channels(collector: Collector) -> dict[str, Index]:
    """Site -> the labels of its channels, in order; a layer that is called twice counts once."""
    channels: dict[str, list[Index]] = {}
    for labels, name in collector.produced:
        vector = labels.to(torch.int64).numpy()
        known = channels.setdefault(name, [])
        if not any(np.array_equal(vector, other) for other in known):
            known.append(vector)
    return {name: np.concatenate(parts) for name, parts in channels.items()}


def _named_groups(
    members: dict[tuple[tuple[str, ...], str | None], list[int]], ranges: list[range], sites: dict[str, Site]
) -> tuple[Group, ...]:
    """Groups named after their first site; a number tells those apart that share it."""
    groups, used = [], dict.fromkeys(sites, 0)
    ordered = sorted(members, key=lambda key: key[1] is not None)
    for (names, reason), units in zip(ordered, ranges, strict=True):
        used[names[0]] += 1
        suffix = f"#{used[names[0]]}" if used[names[0]] > 1 else ""
        groups.append(Group(names[0] + suffix, units, tuple(sites[name] for name in names), (), reason))
    return tuple(groups)


def _with_consumers(groups: tuple[Group, ...], edges: tuple[Edge, ...]) -> tuple[Group, ...]:
    """The groups, with the nodes that read them."""
    readers: dict[int, dict[str, None]] = {}
    owner = {unit: index for index, group in enumerate(groups) for unit in group.units}
    for edge in edges:
        for unit in np.unique(edge.units[edge.units >= 0]):
            readers.setdefault(owner[int(unit)], {})[edge.consumer] = None
    return tuple(
        Group(group.name, group.units, group.sites, tuple(readers.get(index, {})), group.frozen)
        for index, group in enumerate(groups)
    )


def _pieces(values: dict[str, Any], unit_of: Index) -> tuple[Index, ...]:
    """The distinct sets of units that make up the whole of an axis of some value."""
    cores = {id(plane.core): plane.core for value in labels_in(tuple(values.values())) for plane in value.planes}
    pieces: dict[bytes, Index] = {}
    seen: set[bytes] = set()
    for core in cores.values():
        numbers = core.reshape(-1).to(torch.int64).numpy()
        if numbers.tobytes() not in seen:
            seen.add(numbers.tobytes())
            units = np.unique(_units_at(unit_of, torch.from_numpy(numbers)))
            if len(units) and units[0] >= 0:
                pieces.setdefault(units.tobytes(), units)
    return tuple(pieces.values())


def _units_at(unit_of: Index, labels: Tensor) -> Index:
    """The units of a vector of labels, -1 where there is no label."""
    numbers = labels.to(torch.int64).numpy()
    return np.where(numbers < 0, -1, unit_of[numbers]) if len(unit_of) else np.full(len(numbers), -1)
