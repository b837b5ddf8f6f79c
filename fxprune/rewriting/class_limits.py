"""What a model's own class can run narrower, found by trying: layers to hold whole, and pieces to keep equal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx, nn

from fxprune.caller.arrays import Flags
from fxprune.caller.isolation import undisturbed
from fxprune.coupling.branch_units import SITE
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling, Group
from fxprune.coupling.units import units_along
from fxprune.errors import FxpruneError, stage, summary
from fxprune.planning.allocation import Allocation
from fxprune.planning.planned import Planned
from fxprune.rewriting.own_class import Attempt, UnfitError
from fxprune.rules.context import labels_in
from fxprune.tracing.graph import RECORD, ClassLimits, ModelGraph, captured_of
from fxprune.tracing.settings import settings_of

_TRIALS = 2  # choices of units that the class has to run without


def keep_to(graph: Any, limits: ClassLimits) -> None:
    """Let the coupling of a captured graph keep to what a class can run narrower."""
    graph.meta[RECORD] = replace(captured_of(graph), limits=limits)


def limits_of(part: nn.Module, graph: Any, **options: Any) -> ClassLimits:
    """What the class of `part` can run narrower, where `graph` was captured from it.

    Half of the units of every group are removed, at random, and the class is narrowed in that way. Where it does not
    run, the nodes that its code does not follow tell which groups are held whole, or which pieces are kept equal;
    failures that no node explains are searched for among all groups. `options` are those of `analyse`.
    """
    with stage("narrowing"), undisturbed():
        search = _Search(Attempt(part, settings_of(graph), graph), options)
        limits = captured_of(graph).limits
        keep_to(graph, replace(limits, held={**limits.held, **_held_twice(part, search.coupling())}))
        for seed in range(_TRIALS):
            while (failure := search.failure(seed)) is not None:
                search.limit(failure, seed)
        return replace(captured_of(graph).limits, blocks=str(options.get("blocks", "")))


def _held_twice(part: nn.Module, coupling: Coupling) -> dict[str, str]:
    """Blocks that would not vanish with their entry of a list, as a module holds them, or parts of them, elsewhere."""
    found = dict[str, str]()
    for site in coupling.sites:
        path = site.name.removeprefix(SITE)
        if site.name.startswith(SITE) and (inside := _other_holders(part, path)):
            found[site.name] = f"the model also holds {path} as {inside[0]}, outside of its list"
    return found


def _other_holders(part: nn.Module, path: str) -> list[str]:
    """The other paths of a block's modules that do not lead through its list."""
    entries, own = part.get_submodule(path.rpartition(".")[0]), set(part.get_submodule(path).modules())
    held = (name for name, module in _outside(part, entries, "") if module in own and dict(module.named_parameters()))
    return list(held)


def _outside(module: nn.Module, entries: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The paths and modules inside of a module that do not lead through a list."""
    for name, child in module.named_children():
        if child is not entries:
            yield f"{path}{name}", child
            yield from _outside(child, entries, f"{path}{name}.")


@dataclass(slots=True)
class _Search:
    """The narrowing of a class, and the options of the coupling."""

    attempt: Attempt
    options: dict[str, Any]

    @property
    def graph(self) -> ModelGraph:
        return self.attempt.graph

    def coupling(self) -> Coupling:
        return analyse(self.graph, **self.options)

    def failure(self, seed: int, only: Collection[str] | None = None, *, labels: bool = True) -> FxpruneError | None:
        """Why the class does not run without some units of all groups, or of some; None where it does."""
        coupling = self.coupling()
        planned = Planned(self.graph, coupling, trial(coupling, seed, only))
        try:
            self.attempt.narrowed(planned, labels=labels, prove=False)
        except FxpruneError as error:
            return error
        return None

    def limit(self, failure: FxpruneError, seed: int) -> None:
        """Add what a failure tells to the limits."""
        limits, coupling = captured_of(self.graph).limits, self.coupling()
        nodes = {node.name: node for node in self.graph.graph.nodes}
        even, odd = list(limits.even), dict.fromkeys(failure.nodes if isinstance(failure, UnfitError) else ())
        for names in failure.even if isinstance(failure, UnfitError) else ():
            places = tuple(place for name in names for place in _places(coupling, trial(coupling, seed), name))
            if len(places) > 1 and places not in even:
                even.append(places)
                odd = {name: None for name in odd if name not in names}
        groups = {g.name: self.line_of(nodes[name]) for name in odd for g in _touched(coupling, nodes[name])}
        if not groups and len(even) == len(limits.even):
            why = summary(failure.__cause__ or failure)
            labels = self.failure(seed, labels=False) is None  # running it takes less time than capturing it
            groups = dict.fromkeys(self.failing([g.name for g in coupling.prunable], seed, labels=labels), why)
        reasons = {name: f"its own class does not run with fewer ({why})" for name, why in groups.items()}
        sites = {site.name: reasons[g.name] for g in coupling.prunable if g.name in reasons for site in g.sites}
        keep_to(self.graph, replace(limits, held={**limits.held, **sites}, even=tuple(even)))

    def line_of(self, node: fx.Node) -> str:
        """The user's line at a node; its name where only layers of torch made it."""
        of_capture = next(iter(self.graph.graph.nodes)).stack_trace  # where all inputs are made
        return " ".join(node.stack_trace.split()) if node.stack_trace not in (None, of_capture) else node.name

    def failing(self, groups: Sequence[str], seed: int, *, labels: bool) -> Sequence[str]:
        """The groups that the class cannot run narrower, by halves; all of them where only several together fail."""
        if len(groups) == 1:
            return groups
        halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        odd = [half for half in halves if self.failure(seed, half, labels=labels) is not None]
        found = [name for half in odd for name in self.failing(half, seed, labels=labels)]
        return found or groups


def trial(coupling: Coupling, seed: int, only: Collection[str] | None = None) -> Flags:
    """The kept units where a random share of every group, or of some, is removed; no two groups are alike."""
    groups = [(group.name, group.units.start, group.units.stop) for group in coupling.prunable]
    generator, keep = np.random.default_rng(seed), np.ones(coupling.units, dtype=bool)
    drawn = generator.random(coupling.units)
    for name, start, end in groups:
        count = min(max(round((end - start) * generator.uniform(0.2, 0.8)), 1), end - start - 1)
        if only is None or name in only:
            keep[start + np.argsort(drawn[start:end])[:count]] = False
    units = {site.name: site.units for site in coupling.sites}
    equal, larger = (
        tuple(tuple(units[name] for name in names) for names in sets) for sets in (coupling.balanced, coupling.larger)
    )
    even = tuple(tuple(map(np.array, axes)) for axes in coupling.even)
    return Allocation(drawn, drawn, groups, coupling.pieces, equal + even, larger, coupling.floors).settled(keep)


def _places(coupling: Coupling, keep: Flags, node: str) -> list[tuple[str, int, int]]:
    """The axes along which the values of a node lose units, in all of its outputs; none where one holds no units."""
    values, gone, found = labels_in(coupling.values[node]), np.flatnonzero(~keep), list[tuple[str, int, int]]()
    for axis in range(values[0].ndim if values else 0):
        places = [(node, output, axis) for output in range(len(values))]
        units = [units_along(coupling.values, coupling.unit_of, *place) for place in places]
        if any(along is not None and np.isin(along, gone).any() for along in units):
            found += [] if None in units else places
    return found


def _touched(coupling: Coupling, node: fx.Node) -> list[Group]:
    """The groups whose units a node reads or gives."""
    values = labels_in([coupling.values[other.name] for other in (node, *node.all_input_nodes)])
    labels = [plane.core.long().reshape(-1).numpy() for value in values for plane in value.planes]
    units = [np.append(coupling.unit_of, -1)[row] for row in labels]
    return [group for group in coupling.prunable if any(np.isin(group.units, row).any() for row in units)]
