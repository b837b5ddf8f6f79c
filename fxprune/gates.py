"""Gates: nodes on the edges where channels are read, for scoring and as the oracle that proves a removal."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxprune.capture import ModelGraph
from fxprune.coupling import Coupling, Edge, Index
from fxprune.example import PackedSpec
from fxprune.moments import Gathering
from fxprune.positions import PositionDraw, first_of_each
from fxprune.recurrence import PackedGate, gated_module
from fxprune.rules.movement import move
from fxprune.rules.table import RULES, key_of
from fxprune.signals import Through, directions


class Gate(nn.Module, ABC):
    """Stands on one edge; `units[i]` is the unit that position i along axis `dim` belongs to, or -1."""

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        self.dim, self.units, self.reads = edge.dim, edge.units, f"{edge.source} -> {edge.consumer}"
        self.key = edge.source, edge.parameter or str(edge.dim)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Look at `x`, or change it."""

    @abstractmethod
    def weigh(self, weight: Tensor) -> Tensor:
        """Do the same to the columns of a weight that reads the units; nothing is sampled."""

    def watch(self, x: Tensor) -> None:
        """See the activations, channels last, that the weight of `weigh` reads."""


class Mask(Gate):
    """The oracle's gate: zeroes the positions of the units that are removed."""

    def __init__(self, edge: Edge, keep: NDArray[np.bool_]) -> None:
        super().__init__(edge)
        self.kept = torch.from_numpy(np.append(keep, True)[edge.units])

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.dim] = len(self.kept)
        return torch.where(self.kept.to(x.device).view(shape), x, x.new_zeros(()))

    def weigh(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept.to(weight.device), weight, weight.new_zeros(()))


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the samples of a batch lie in a tensor: along `axis`, each in `times` consecutive places of it."""

    axis: int = 0
    times: int = 1

    def first(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        """The tensor with the samples along axis 0, and where `dim` is then."""
        if self.axis == dim:
            return x, dim
        moved, dim = x.movedim(self.axis, 0), dim + int(dim < self.axis)
        if self.times == 1:
            return moved, dim
        return moved.reshape(-1, self.times, *moved.shape[1:]), dim + 1


@dataclass(slots=True)
class Draw:
    """What the gates have in common while scoring: the rows of the batch to sample, how finely, and from which seed.

    `moments` says whether to gather them. `labels` are the classes of the rows. Where positions have classes of their own, `positions` draws them.
    """

    rows: Tensor
    projections: int
    seed: int
    moments: bool = False
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: PositionDraw | None = None
    batch: int = 0
    room: Tensor = field(default_factory=lambda: torch.empty(0))
    used: int = 0

    def make_room(self, probes: list[Probe]) -> None:
        """One block for all samples of a batch: many small ones between the activations would split the heap."""
        size = len(self.rows) * self.projections * sum(len(probe.own) for probe in probes)
        double = any(probe.weight.dtype == torch.float64 for probe in probes)
        dtype = torch.float64 if double else torch.float32
        self.room, self.used = torch.empty(size, dtype=dtype), 0

    def take(self, *shape: int) -> Tensor:
        """The next part of the block, of the given shape; a block of its own where the rest is too small."""
        start, self.used = self.used, self.used + math.prod(shape)
        enough = self.used <= len(self.room)
        return self.room[start : self.used].view(shape) if enough else self.room.new_empty(shape)


class Probe(Gate):
    """The scoring gate: takes samples in the forward pass and the R-Score's sums in the backward pass.

    `weight` stands at one for every position along the axis; its gradient is that of the loss by a factor there.
    `samples` collects tensors of shape (rows, own units, projections), `labels` the classes of their rows. `rows` says
    where the samples of a batch lie; None where the tensor does not depend on them.
    """

    def __init__(
        self, edge: Edge, draw: Draw, device: torch.device, dtype: torch.dtype, rows: Rows | None = Rows()
    ) -> None:
        super().__init__(edge)
        self.rows = rows
        self.weight = nn.Parameter(torch.ones(len(edge.units), device=device, dtype=dtype))
        self.draw = draw
        self.own, self.positions = _positions(edge.units)
        self.samples: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.keys = torch.empty(0, dtype=torch.float64)
        self.seen = 0
        self.gathering = Gathering(draw.seed) if draw.moments else None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen < self.draw.batch:
            self.seen = self.draw.batch
            self._take(x.detach())
            if self.gathering is not None:
                self.gathering.add(x, self.dim)
        return Through.apply(x, self.weight, self.dim)  # type: ignore[no-any-return, no-untyped-call]

    def weigh(self, weight: Tensor) -> Tensor:
        return Through.apply(weight, self.weight, 1)  # type: ignore[no-any-return, no-untyped-call]

    def watch(self, x: Tensor) -> None:
        if self.gathering is not None:
            self.gathering.add(x, x.ndim - 1)

    def _take(self, x: Tensor) -> None:
        """Sample position by position where the positions have classes and `x` has the positions; else row by row."""
        by_row, dim = (x.unsqueeze(0), self.dim + 1) if self.rows is None else self.rows.first(x, self.dim)
        draw = self.draw.positions
        # Several places of a sample in a row are its steps, flattened, where they are all that it has; else windows.
        aligned = self.rows is not None and dim > 0 and (self.rows.times == 1 or by_row.ndim == 3)
        if draw is not None and aligned and draw.fits(by_row.movedim(dim, -1).shape[:-1]):
            self._take_positions(by_row.movedim(dim, -1), draw)
        elif len(self.draw.rows):
            self.samples.append(self._sample(by_row, dim))
            self.labels.append(self.draw.labels)

    def _take_positions(self, x: Tensor, draw: PositionDraw) -> None:
        """Add the chosen positions of `x`, (samples, *positions, channels), and keep those with the lowest keys."""
        places = draw.places(x.shape[:-1])
        chosen = x[tuple(index.to(x.device) for index in places.index)]
        samples = torch.cat([*self.samples, self._projected(self._by_unit(chosen, 1))])
        labels = torch.cat([*self.labels, places.labels])
        keys = torch.cat([self.keys, places.keys])
        kept = first_of_each(labels, keys, draw.per_class)
        self.samples, self.labels, self.keys = [samples[kept]], [labels[kept]], keys[kept]

    def _sample(self, by_row: Tensor, dim: int) -> Tensor:
        """The projected activations of the drawn rows: (rows, own units, projections)."""
        drawn = self.draw.rows.to(by_row.device)
        chosen = by_row.expand(len(drawn), *by_row.shape[1:]) if self.rows is None else by_row
        if len(drawn) != len(chosen):
            chosen = chosen[drawn % len(chosen)]
        return self._projected(self._by_unit(chosen, dim))

    def _by_unit(self, chosen: Tensor, dim: int) -> Tensor:
        """The values of each own unit along axis 1, whatever positions along axis `dim` it has."""
        spread = chosen.movedim(dim, 1)
        if self.positions is None:
            return spread
        return torch.cat([spread, spread.new_zeros(spread[:, :1].shape)], 1)[:, self.positions.to(chosen.device)]

    def _projected(self, spread: Tensor) -> Tensor:
        """Values (rows, own units, ...) on the seeded directions: (rows, own units, projections)."""
        flat = spread.reshape(len(spread) * len(self.own), -1)
        axes = directions(flat.shape[-1], self.draw.projections, seed=self.draw.seed)
        room = self.draw.take(len(flat), axes.shape[1])
        if flat.device == room.device and flat.dtype == room.dtype:
            torch.mm(flat, axes.to(flat.dtype), out=room)
        else:
            room.copy_(flat @ axes.to(flat))
        return room.view(len(spread), len(self.own), -1)


def _positions(units: Index) -> tuple[Index, Tensor | None]:
    """The units of an edge in order, and the positions of each, padded with -1; None where position i is unit i."""
    own, inverse, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    table = np.full((len(own), counts.max()), -1, dtype=np.int64)
    column = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[inverse[order], column] = order
    if own[0] < 0:
        own, table = own[1:], table[1:]
    if table.shape == (len(units), 1) and np.array_equal(table[:, 0], np.arange(len(units))):
        return own, None
    return own, torch.from_numpy(table)


def insert(graph: ModelGraph, coupling: Coupling, make: Callable[[Edge], Gate]) -> tuple[fx.GraphModule, list[Gate]]:
    """A graph with the same modules as `graph` and a gate on every edge that reads a prunable unit.

    Consumers that read the same axis of the same node share a gate.
    """
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.graph, nodes))
    by_name = {node.name: copy for node, copy in nodes.items()}
    gated = fx.GraphModule(graph, copied, type(graph).__name__)
    gates: list[Gate] = []
    changes = _changes(graph)
    for (source, dim), edges in _shared(coupling).items():
        name = f"gate_{source}_{dim}"
        if isinstance(coupling.specs[source], PackedSpec):
            gates.append(make(replace(edges[0], dim=2)))
            gates[-1].key = edges[0].source, str(edges[0].dim)
            gated.add_module(name, PackedGate(gates[-1]))
        else:
            gates.append(make(edges[0]))
            gated.add_module(name, gates[-1])
        consumers = dict.fromkeys(by_name[edge.consumer] for edge in edges)
        _insert_gate(copied, by_name[source], name, consumers, changes.get(source, ()))
    for index, (path, inner) in enumerate(_inside(coupling, graph).items()):
        own = {parameter: make(edge) for parameter, edge in inner.items()}
        gates += own.values()
        gated.add_module(f"gated_{index}", gated_module(graph.get_submodule(path), own))
        for node in copied.nodes:
            if node.op == "call_module" and node.target == path:
                node.target = f"gated_{index}"
    copied.lint()
    gated.recompile()
    return gated, gates


def _shared(coupling: Coupling) -> dict[tuple[str, int], list[Edge]]:
    """The edges that have units, by the node and the axis that they read."""
    shared: dict[tuple[str, int], list[Edge]] = {}
    for edge in coupling.edges:
        if edge.parameter is None and (edge.units >= 0).any():
            shared.setdefault((edge.source, edge.dim), []).append(edge)
    return shared


def _inside(coupling: Coupling, graph: ModelGraph) -> dict[str, dict[str, Edge]]:
    """Module -> its parameters that read units inside it, and the edges on which they do.

    An upper layer's input is gated as (samples, steps, channels).
    """
    targets = {node.name: str(node.target) for node in graph.graph.nodes}
    found: dict[str, dict[str, Edge]] = {}
    for edge in coupling.edges:
        if edge.parameter is not None and (edge.units >= 0).any():
            dim = 2 if edge.parameter.startswith("weight_ih") else 1
            found.setdefault(targets[edge.consumer], {})[edge.parameter] = replace(edge, dim=dim)
    return found


def _insert_gate(
    graph: fx.Graph, source: fx.Node, name: str, consumers: Iterable[fx.Node], changes: Iterable[str]
) -> None:
    """Call the gate before its first consumer, and again wherever the source was changed in place since."""
    waiting, changed = dict.fromkeys(consumers), set(changes)
    gate: fx.Node | None = None
    for node in list(graph.nodes):
        if node in waiting:
            if gate is None:
                with graph.inserting_before(node):
                    gate = graph.call_module(name, (source,))
            node.replace_input_with(source, gate)
        if node.name in changed:
            gate = None


def _changes(graph: ModelGraph) -> dict[str, list[str]]:
    """Node -> the nodes that change its storage in place."""
    roots: dict[fx.Node, fx.Node] = {}
    changes: dict[fx.Node, list[str]] = {}
    for node in graph.graph.nodes:
        in_place = works_in_place(node, graph)
        inputs = node.all_input_nodes
        aliases = inputs and (in_place or (key_of(node, graph) in RULES and RULES[key_of(node, graph)] is move))
        roots[node] = roots[inputs[0]] if aliases else node
        if in_place and inputs:
            changes.setdefault(roots[node], []).append(node.name)
    return {node.name: changes[root] for node, root in roots.items() if root in changes}


def works_in_place(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name == "setitem" or name[:1] == "i"
    operators = node.op == "call_function" and getattr(operator, name, None) is node.target and in_place
    return bool(node.kwargs.get("inplace")) or operators or (name.endswith("_") and not name.endswith("__"))
