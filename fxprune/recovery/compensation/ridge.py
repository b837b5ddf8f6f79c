"""Bias and ridge: removed channels are predicted from kept ones, by the moments of the scoring pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.coupling.groups import Key, key_of_edge
from fxprune.coupling.readers import Reader, from_matrix, readers_on, uses
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.aims import called, norm_after
from fxprune.recovery.compensation.biases import add_to_bias, is_shared, takes_bias
from fxprune.rewriting.remaining import Checker, narrow
from fxprune.rules.vocabulary import Slot
from fxprune.scoring.moments import Moments
from fxprune.scoring.prediction import Prediction, prediction
from fxprune.tracing.graph import ModelGraph


def fill(
    planned: Planned, small: ModelGraph, moments: Mapping[Key, Moments], *, linear: bool,
    only: Callable[[fx.Node], bool] | None = None, new_biases: bool = True,
) -> tuple[str, ...]:  # fmt: skip
    """Add the prediction of the removed units to every reader of `small`, in place; returns the readers' nodes.

    It is `linear` in the kept units, or the mean alone. `only` chooses nodes of `small`. Without `new_biases`, readers
    that have no bias get a linear function without a constant, or nothing.
    """
    graph, coupling, keep = planned
    checker, padded = Checker(graph, coupling, keep), np.append(keep, True)
    owners = {id(parameter): name for name, parameter in graph.named_parameters()}
    nodes, counts = {node.name: node for node in small.graph.nodes}, uses(small)
    found = dict[str, None]()
    for edge in coupling.edges:
        kept, node = padded[edge.units], nodes.get(edge.consumer)
        known = moments.get(key_of_edge(edge))
        if known is None or node is None or bool(kept.all()) or (only and not only(node)):
            continue
        wide, thin = readers_on(graph, edge), readers_on(small, replace(edge, units=edge.units[kept]))
        for whole, reader in zip(wide, thin, strict=True) if len(wide) == len(thin) else ():
            if not is_shared(reader, counts):
                recurrent = is_recurrent(small, node)  # whose rows are gates
                norm = None if recurrent else norm_after(small, node, reader, coupling.specs)[0]
                masks = None if recurrent else checker.masks(checker.old[node.name])
                constant = takes_bias(reader, norm, new=new_biases)
                if not (constant or linear):
                    continue
                by = prediction(known if constant else known.uncentred(), kept, linear=linear, groups=whole.groups)
                _add(by, checker, owners[id(whole.weight)], whole, reader, masks, norm)
                found[edge.consumer] = None
    return tuple(found)


def is_recurrent(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a recurrent layer: those are filled in, others are refitted."""
    return isinstance(called(graph, node), nn.RNNBase | nn.RNNCellBase)


def _add(
    by: Prediction, checker: Checker, owner: str, whole: Reader, reader: Reader, masks: list[Tensor] | None,
    norm: nn.Module | None,
) -> None:  # fmt: skip
    """Add a prediction to the narrowed reader of an original one, whose weight is called `owner`.

    `masks` mark the kept indices of every axis of the original's output.
    """
    matrix = whole.matrix().double()
    groups, _, inputs, _ = matrix.shape
    moved, constant = torch.zeros_like(matrix), matrix.new_zeros(matrix.shape[:2])
    for group in range(groups):  # a group reads its own channels only
        own = slice(group * inputs, (group + 1) * inputs)
        linear, offset = (torch.from_numpy(x).to(matrix) for x in (by.map[own, own], by.offset[own]))
        moved[group] = torch.einsum("orp,rs->osp", matrix[group], linear)
        constant[group] = matrix[group].sum(-1) @ offset
    transposed = whole.windows is not None and whole.windows.transposed
    weight = from_matrix(moved, tuple(whole.weight.shape), transposed=transposed)
    narrowed = narrow(weight, [checker.kept(Slot(owner, axis)) for axis in range(weight.ndim)])
    reader.weight.data += narrowed.to(reader.weight)
    mask = checker.kept(Slot(owner, 0)) if masks is None else masks[reader.channel_axis]
    constant = constant.reshape(-1)
    add_to_bias(reader, norm, constant if mask is None else constant[mask.to(constant.device)])
