"""Sequential refitting: the layers of a rewritten graph, front to back, by regularised least squares."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import torch
from torch import fx

from fxprune.coupling.readers import Reader, reader_of, uses
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.aims import Aim, aim_of
from fxprune.recovery.compensation.biases import add_to_bias, bias_of, is_shared, takes_bias
from fxprune.recovery.compensation.least_squares import Fit, refitted
from fxprune.recovery.compensation.row_sampling import GraphPair, rows_for
from fxprune.recovery.compensation.wide import by_channel
from fxprune.reporting.records import Refit
from fxprune.rewriting.remaining import Checker
from fxprune.scoring.calibration import Calibration
from fxprune.scoring.lockstep import Stepper
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.in_place import works_in_place

WIDEST = 4096  # features of a group of a layer; wider ones are fitted by channel


def refit(planned: Planned, small: ModelGraph, data: Calibration, *, seed: int = 0) -> tuple[Refit, ...]:
    """Refit, in place, every layer of `small` whose inputs differ from those in the original graph, front to back.

    Both graphs are in eval mode. `seed` is that of the sampled positions.
    """
    graph, coupling, keep = planned
    steps = partial(Stepper, inputs=data.inputs, numbers=data.numbers)
    generator = torch.Generator().manual_seed(seed)
    pair = GraphPair(steps(graph), steps(small), Checker(graph, coupling, keep), data, generator)
    edges, counts = {edge.consumer for edge in coupling.edges}, uses(small)
    changed, found = set[fx.Node](), list[Refit]()
    with torch.no_grad():
        for node in pair.small.nodes:
            if not changed.isdisjoint(node.all_input_nodes) or (node.name in edges and pair.is_narrowed(node)):
                changed.add(node)
                found += _refit(pair, node, counts)
            pair.passed(node)
    return tuple(found)


def _refit(pair: GraphPair, node: fx.Node, counts: Counter[int]) -> list[Refit]:
    """Fit the layer that a node calls, if it calls one whose weights nothing else uses."""
    reader = _layer(pair, node, counts)
    if reader is None:
        return []
    for source in node.all_input_nodes:
        pair.small.to(source)
    aim = aim_of(pair.small.module, node, reader, pair.small.values, pair.checker.coupling.specs)
    is_wide = math.prod(reader.matrix().shape[2:]) > WIDEST
    fit = by_channel(pair, node, reader, aim.norm) if is_wide else _fit(pair, node, reader, aim)
    if fit is None:
        return []
    if fit.strength is not None:
        change = (fit.bias - bias_of(reader)).reshape(-1)
        reader.write(fit.weight.reshape(reader.matrix().shape))
        add_to_bias(reader, aim.norm, change)
    return [Refit(str(node.target) if node.op == "call_module" else node.name, fit.before, fit.after, fit.strength)]


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
    return refitted(rows[0], weight, bias_of(reader), intercept=takes_bias(reader, aim.norm), rectified=rows[1])
