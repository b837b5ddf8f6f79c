"""Sequential refitting: the layers of a rewritten graph, front to back, by regularised least squares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxprune.caller.source_lines import warn
from fxprune.coupling.readers import Reader, reader_of, uses
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.aims import Aim, aim_of
from fxprune.recovery.compensation.biases import add_to_bias, bias_of, is_shared, restorer, takes_bias
from fxprune.recovery.compensation.least_squares import Fit, refitted
from fxprune.recovery.compensation.row_sampling import GraphPair, rows_for
from fxprune.recovery.compensation.wide import by_channel
from fxprune.reporting.records import Refit
from fxprune.rewriting.remaining import Checker
from fxprune.scoring.calibration import Calibration
from fxprune.scoring.lockstep import Stepper
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.in_place import works_in_place

CHUNKS = 8  # of the layers that are refitted before the error is looked at
WIDE = 4096  # features of a group of a layer; where several are of one channel, wider ones are fitted by channel
WIDEST = 16384  # features that are fitted at all


def refit(
    planned: Planned, small: ModelGraph, data: Calibration, error: Callable[[ModelGraph], float] | None, *,
    seed: int = 0, all_rows: bool = True, new_biases: bool = True,
) -> tuple[Refit, ...]:  # fmt: skip
    """Refit, in place, every layer of `small` whose inputs differ from those in the original graph, front to back.

    Both graphs are in eval mode. `seed` is that of the sampled positions. The samples held out choose the strength of
    each fit; with `all_rows`, the fit then includes them. Without `new_biases`, layers that have no bias get none. With
    an `error`, a few refits at a time are kept, if it does not grow; if it does, they are tried one by one.
    """
    graph, coupling, keep = planned
    steps = Stepper(graph, data.inputs, data.numbers), Stepper(small, data.of_rewritten.inputs, data.numbers)
    generator = torch.Generator().manual_seed(seed)
    pair = GraphPair(*steps, Checker(graph, coupling, keep), data, generator, all_rows, new_biases)
    changed = set() if data.rewritten is None else {node for node in pair.small.nodes if node.op == "placeholder"}
    consumers = frozenset(edge.consumer for edge in coupling.edges)
    with torch.no_grad():
        if error is None:
            walk = _Refitting(pair, consumers, uses(small), lambda graph: 0.0, 0.0, changed)
            walk.over(pair.small.nodes, len(pair.small.nodes))
        else:
            walk = _Refitting(pair, consumers, uses(small), error, error(small), changed)
            walk.over(pair.small.nodes, max(1, -(-len(consumers) // CHUNKS)))
    return tuple(walk.found)


@dataclass(slots=True, eq=False)
class _Refitting:
    """The walk over a pair of graphs: the nodes whose inputs changed, the refits that were kept, and the error."""

    pair: GraphPair
    consumers: frozenset[str]
    counts: Counter[int]
    error: Callable[[ModelGraph], float]
    best: float
    changed: set[fx.Node] = field(default_factory=set)
    found: list[Refit] = field(default_factory=list)

    def over(self, nodes: Sequence[fx.Node], at_once: int) -> None:
        """Refit the layers of some nodes; after every `at_once` of them, the error says whether to keep these."""
        start = 0
        while start < len(nodes):
            restore = [self.pair.whole.saved(), self.pair.small.saved()]
            end, done, undo = self._some(nodes, start, at_once)
            value = self.error(self.pair.small.module) if undo else self.best
            if value <= self.best:
                self.best, self.found = value, self.found + done
            else:
                for put_back in (*reversed(undo), *restore):
                    put_back()
                if at_once > 1:
                    self.over(nodes[start:end], 1)
                else:
                    self.found += [replace(each, after=each.before, strength=None) for each in done]
                    self._some(nodes[:end], start, 0)
            start = end

    def _some(
        self, nodes: Sequence[fx.Node], start: int, most: int
    ) -> tuple[int, list[Refit], list[Callable[[], None]]]:
        """Pass nodes until so many layers are refitted: the end, the refits, and functions that undo them."""
        done, undo = list[Refit](), list[Callable[[], None]]()
        for place in range(start, len(nodes)):
            node = nodes[place]
            if not self.changed.isdisjoint(node.all_input_nodes) or (
                node.name in self.consumers and self.pair.is_narrowed(node)
            ):
                self.changed.add(node)
                if most:
                    done += _refit(self.pair, node, self.counts, undo)
            self.pair.passed(node)
            if most and len(undo) >= most:
                return place + 1, done, undo
        return len(nodes), done, undo


def _refit(pair: GraphPair, node: fx.Node, counts: Counter[int], undo: list[Callable[[], None]]) -> list[Refit]:
    """Fit the layer that a node calls, if it calls one whose weights nothing else uses; `undo` gets its restorer."""
    reader = _layer(pair, node, counts)
    if reader is None:
        return []
    for source in node.all_input_nodes:
        pair.small.to(source)
    aim = aim_of(pair.small.module, node, reader, pair.small.values, pair.checker.coupling.specs)
    features = math.prod(reader.matrix().shape[2:])
    fit = by_channel(pair, node, reader, aim.norm) if features > WIDE else None
    if fit is None and features > WIDEST:
        warn(f"{_name(node)} reads {features:,} numbers: it is not refitted, as layers are up to {WIDEST:,}")
    elif fit is None:
        fit = _fit(pair, node, reader, aim)
    if fit is None:
        return []
    if fit.strength is not None:
        undo.append(restorer(reader, aim.norm))
        change = (fit.bias - bias_of(reader)).reshape(-1)
        reader.write(fit.weight.reshape(reader.matrix().shape))
        add_to_bias(reader, aim.norm, change)
    return [Refit(_name(node), fit.before, fit.after, fit.strength)]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _layer(pair: GraphPair, node: fx.Node, counts: Counter[int]) -> Reader | None:
    """The layer that a node calls, unless others use its weights too, or its output is changed in place."""
    reader, original = reader_of(pair.small.module, node), pair.whole.by_name.get(node.name)
    if reader is None or original is None or not reader.weight.numel() or is_shared(reader, counts):
        return None
    changed = len(original.users) > 1 and any(works_in_place(user, pair.whole.module) for user in original.users)
    return None if changed else reader


def _fit(pair: GraphPair, node: fx.Node, reader: Reader, aim: Aim) -> Fit | None:
    """The layer's weights and biases by least squares, or None where there are no rows for them."""
    matrix = reader.matrix()
    rows = pair.rows(node, reader, aim, rows_for(math.prod(matrix.shape[2:]), len(matrix)))
    if rows is None:
        return None
    weight = matrix.flatten(2).double()
    intercept, all_rows = takes_bias(reader, aim.norm, new=pair.new_biases), pair.all_rows
    return refitted(rows[0], weight, bias_of(reader), intercept=intercept, rectified=rows[1], all_rows=all_rows)
