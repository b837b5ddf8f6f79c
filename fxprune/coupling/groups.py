"""The facts that coupling finds: sites, groups of units, and the edges that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.caller.arrays import Index
from fxprune.errors import plural, visible
from fxprune.rules.vocabulary import Slot

if TYPE_CHECKING:
    import networkx as nx

Key = tuple[str, str]  # the node that gives the channels, and the axis or the parameter by which they are read


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A layer's channels: `units[i]` is the unit that channel i belongs to, or -1 for a channel that is always kept."""

    name: str
    units: Index

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.units)

    def __repr__(self) -> str:
        return visible(f"<site {self.name}: {plural(self.width, 'channel')}>")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Units that are ranked against each other: the layers that produce their channels are connected through them.

    `units` are consecutive numbers, `sites` the layers that produce the channels, `consumers` the nodes that read them.
    `frozen` says why the group is not pruned, or is None; `inexact` says why removal changes more than the zeros that
    are read, or is None. `kind` is one of "heads", "head_dim" (places in heads), "experts", "expert_units" (hidden
    units of experts), and "hidden" for all others.
    """

    name: str
    units: range
    sites: tuple[Site, ...]
    consumers: tuple[str, ...]
    frozen: str | None = None
    inexact: str | None = None
    kind: str = "hidden"

    def __len__(self) -> int:
        return len(self.units)

    def channels(self, site: Site) -> int:
        """How many channels of `site` belong to this group."""
        return int(np.isin(site.units, self.units).sum())

    def __repr__(self) -> str:
        layers, readers = (_some(names) for names in ([site.name for site in self.sites], self.consumers))
        return visible(f"<group {self.name}: {len(self)} units of {layers}, read by {readers}, {self._state}>")

    @property
    def _state(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "prunable"
        return state + (f", inexactly: {self.inexact}" if self.inexact and not self.frozen else "")

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self)} units, {self._state}"]
        lines += [f"  {site.name}: {self.channels(site)} of {site.width} channels" for site in self.sites]
        if self.consumers:
            lines.append(f"  read by {', '.join(self.consumers)}")
        return visible("\n".join(lines))


def _some(names: Sequence[str], shown: int = 3) -> str:
    """The first of some names, and the number of the others."""
    return (", ".join(names[:shown]) or "none") + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """Node `consumer` reads channels of the units `units` (-1: none) along axis `dim` of the output of `source`.

    With a `parameter`, the two are one node, whose module reads the units internally, through axis `dim` of that
    parameter. With a `chosen` node, the units are experts: their outputs are rows of `source`, and the numbers of that
    node say which expert gave each row. A removed unit is read as zero, or as minus infinity where it is `compared`.
    """

    consumer: str
    source: str
    dim: int
    units: Index
    parameter: str | None = None
    chosen: str | None = None
    compared: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """A layer whose channels are experts: `chosen` is the number chosen for each row, `key` that of their moments."""

    site: str
    chosen: int
    key: Key | None


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The nodes that work for one expert alone, the unit `expert` (-1: always kept), in the order of the graph.

    `through` maps each of them that adds to the value of another node to that node.
    """

    expert: int
    nodes: tuple[str, ...]
    through: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """All that the label interpreter finds out about a graph.

    `unit_of` maps labels to units (-1: always kept), `merged` to classes of tied labels. `values` holds the labels of
    all nodes, `axes` the axes of their planes, `specs` their shapes on the example, `remembered` numbers that rules
    keep; `slots` the first label and the size of every slot. `pieces` are sets of units that make up a whole axis of
    some tensor: one of each is kept. `statistics` are nodes that take a statistic over prunable channels; `balanced`
    are sets of sites of equal width, `larger` pairs whose first site is wider than the second. `even` are sets of axes,
    each given by the unit of every index, that keep equal numbers of indices. `floors` are sets of units, each with the
    least number that is kept, `routers` the layers that choose among experts, and `branches` the parts of the graph
    that work for one.
    """

    groups: tuple[Group, ...]
    sites: tuple[Site, ...]
    edges: tuple[Edge, ...]
    unit_of: Index
    merged: Index
    values: dict[str, Any]
    slots: dict[Slot, tuple[int, int]]
    axes: dict[tuple[str, int, int], tuple[int, ...]]
    remembered: dict[tuple[str, str], int]
    specs: dict[str, Any]
    pieces: tuple[Index, ...]
    statistics: tuple[str, ...] = ()
    balanced: tuple[tuple[str, ...], ...] = ()
    larger: tuple[tuple[str, str], ...] = ()
    even: tuple[tuple[tuple[int, ...], ...], ...] = ()
    floors: tuple[tuple[Index, int], ...] = ()
    routers: tuple[Router, ...] = ()
    branches: tuple[Branch, ...] = ()

    def __repr__(self) -> str:
        frozen = len(self.groups) - len(self.prunable)
        free = f"{plural(self.units, 'unit')} in {plural(len(self.prunable), 'group')} can be removed"
        return f"<coupling of {plural(len(self.sites), 'layer')}: {free}, {plural(frozen, 'group')} frozen>"

    @property
    def units(self) -> int:
        """The number of units that may be pruned."""
        return sum(len(group) for group in self.groups if group.frozen is None)

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may be pruned."""
        return tuple(group for group in self.groups if group.frozen is None)

    def frozen(self) -> dict[str, tuple[str, ...]]:
        """Why some layers are not pruned: reason -> the layers."""
        reasons: dict[str, dict[str, None]] = {}
        for group in self.groups:
            if group.frozen is not None:
                reasons.setdefault(group.frozen, {}).update(dict.fromkeys(site.name for site in group.sites))
        return {reason: tuple(names) for reason, names in reasons.items()}

    def graph(self) -> nx.Graph:
        """The bipartite graph of groups and the sites that produce their channels."""
        import networkx as nx  # takes as long as all modules of fxprune

        net: nx.Graph = nx.Graph()
        for group in self.groups:
            net.add_node(group.name, kind="group", size=len(group), frozen=group.frozen)
            for site in group.sites:
                net.add_node(f"site {site.name}", kind="site", width=site.width)
                net.add_edge(group.name, f"site {site.name}", channels=group.channels(site))
        return net


def key_of_edge(edge: Edge) -> Key:
    """The key of an edge's moments."""
    return edge.source, edge.parameter or f"{edge.dim}{' compared' if edge.compared else ''}"
