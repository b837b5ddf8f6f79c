"""Sequential refitting: the readers of a rewritten graph, front to back, by regularised least squares."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxprune.coupling.groups import Coupling
from fxprune.coupling.readers import Reader, reader_of, uses
from fxprune.recovery.compensation.aims import Aim, aim_of
from fxprune.recovery.compensation.biases import add_to_bias, bias_of, takes_bias
from fxprune.recovery.compensation.calibration import Calibration
from fxprune.recovery.compensation.least_squares import Fit, refitted
from fxprune.recovery.compensation.lockstep import Stepper
from fxprune.recovery.compensation.row_sampling import Pair, rows_for
from fxprune.recovery.compensation.wide import by_channel
from fxprune.reporting.records import Refit
from fxprune.rewriting.remaining import Checker
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.in_place import works_in_place

WIDEST = 4096  # features of a group of a layer; wider ones are fitted by channel


def refit(
    graph: ModelGraph,
    small: ModelGraph,
    coupling: Coupling,
    keep: NDArray[np.bool_],
    data: Calibration,
    *,
    seed: int = 0,
) -> tuple[Refit, ...]:
    """Refit, in place, every layer of `small` that reads something else than it did in `graph`.

    Front to back, so that each is fitted to the inputs that those before it now give.

    Args:
        graph, small: the original and the rewritten graph, both in eval mode.
        seed: of the positions that are sampled.
    """
    steps = partial(Stepper, inputs=data.inputs, numbers=data.numbers)
    checker, draw = Checker(graph, coupling, keep), torch.Generator().manual_seed(seed)
    pair = Pair(steps(graph), steps(small), checker, data, draw)
    edges, counts = {edge.consumer for edge in coupling.edges}, uses(small)
    changed = set[fx.Node]()
    found = list[Refit]()
    with torch.no_grad():
        for node in pair.small.nodes:
            if not changed.isdisjoint(node.all_input_nodes) or (node.name in edges and pair.is_narrowed(node)):
                changed.add(node)
                found += _refit(pair, node, counts)
            pair.passed(node)
    return tuple(found)


def _refit(pair: Pair, node: fx.Node, counts: Counter[int]) -> list[Refit]:
    """Fit the layer that a node calls, if it calls one whose weights are its own alone."""
    reader = _layer(pair, node, counts)
    if reader is None:
        return []
    for source in node.all_input_nodes:
        pair.small.to(source)
    aim = aim_of(pair.small.graph, node, reader, pair.small.values, pair.checker.coupling.specs)
    is_wide = math.prod(reader.matrix().shape[2:]) > WIDEST
    fit = by_channel(pair, node, reader, aim.norm) if is_wide else _fit(pair, node, reader, aim)
    if fit is None:
        return []
    if fit.strength is not None:
        change = (fit.bias - bias_of(reader)).reshape(-1)
        reader.write(fit.weight.reshape(reader.matrix().shape))
        add_to_bias(reader, aim.norm, change)
    return [Refit(str(node.target) if node.op == "call_module" else node.name, fit.before, fit.after, fit.strength)]


def _layer(pair: Pair, node: fx.Node, counts: Counter[int]) -> Reader | None:
    """The layer that a node calls, unless its weights serve others too, or what it gives is written over."""
    reader = reader_of(pair.small.graph, node)
    if reader is None or node.name not in pair.whole.by_name or not reader.weight.numel():
        return None
    if counts[id(reader.weight)] > 1 or (reader.bias is not None and counts[id(reader.bias)] > 1):
        return None
    original = pair.whole.by_name[node.name]
    graph: Any = pair.checker.graph
    written = len(original.users) > 1 and any(works_in_place(user, graph) for user in original.users)
    return None if written else reader


def _fit(pair: Pair, node: fx.Node, reader: Reader, aim: Aim) -> Fit | None:
    """The layer's weights and biases by least squares, or None where there are no rows for them."""
    matrix = reader.matrix()
    rows = pair.rows(node, reader, aim, rows_for(math.prod(matrix.shape[2:]), len(matrix)))
    if rows is None:
        return None
    weight = matrix.flatten(2).double()
    return refitted(rows[0], weight, bias_of(reader), intercept=takes_bias(reader, aim.norm), rectified=rows[1])
