"""Bias and ridge: what readers lose is predicted from what stays, by the moments of the scoring pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxprune.coupling.groups import Coupling, Edge, Key, key_of_edge
from fxprune.coupling.readers import Reader, from_matrix, readers_on, uses
from fxprune.recovery.compensation.aims import norm_after
from fxprune.recovery.compensation.biases import add_to_bias
from fxprune.rewriting.remaining import Checker, narrow
from fxprune.rules.vocabulary import Slot
from fxprune.scoring.moments import Moments
from fxprune.tracing.graph import ModelGraph

STRENGTH = 1e-3  # of the ridge, by the mean variance of the channels that stay
TINY = 1e-12  # the least mean variance


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """How channels that go follow from those that stay: map @ x + offset, both of them zero for those that stay."""

    map: NDArray[np.float64]
    offset: NDArray[np.float64]


def filling(moments: Moments, stays: NDArray[np.bool_], *, linear: bool, groups: int = 1) -> Filling:
    """The ridge regression of the channels that go on those that stay in their group; on nothing where not `linear`.

    >>> moments = Moments(np.array([1.0, 2.0]), np.array([[1.0, 2.0], [2.0, 4.0]]))
    >>> filling(moments, np.array([True, False]), linear=True).map.round(2)
    array([[0., 0.],
           [2., 0.]])
    """
    shares, places = np.zeros((len(stays), len(stays))), np.arange(len(stays))
    for own in np.split(places, groups):
        stay, gone = own[stays[own]], own[~stays[own]]
        if linear and moments.covariance.ndim == 2 and len(stay) and len(gone):
            within = moments.covariance[np.ix_(stay, stay)]
            ridge = STRENGTH * max(float(np.trace(within)) / len(stay), TINY)
            across = moments.covariance[np.ix_(stay, gone)]
            shares[np.ix_(gone, stay)] = np.linalg.solve(within + ridge * np.eye(len(stay)), across).T
    return Filling(shares, np.where(stays, 0.0, moments.mean - shares @ moments.mean))


def fill(
    graph: ModelGraph,
    small: ModelGraph,
    coupling: Coupling,
    keep: NDArray[np.bool_],
    moments: Mapping[Key, Moments],
    *,
    linear: bool,
    only: Callable[[fx.Node], bool] | None = None,
) -> tuple[str, ...]:
    """Give every reader of `small`, in place, what the units that went are predicted to be; returns their nodes.

    Args:
        linear: whether by ridge regression on what stays, or by the mean alone.
        only: which nodes of `small` to go over; all where it is None.
    """
    checker, padded = Checker(graph, coupling, keep), np.append(keep, True)
    owners = {id(parameter): name for name, parameter in graph.named_parameters()}
    nodes, counts = {node.name: node for node in small.graph.nodes}, uses(small)
    found = dict[str, None]()
    for edge in coupling.edges:
        stays, node = padded[edge.units], nodes.get(edge.consumer)
        known = moments.get(key_of_edge(edge))
        if known is None or node is None or bool(stays.all()) or (only and not only(node)):
            continue
        wide, thin = readers_on(graph, edge), readers_on(small, _narrowed(edge, stays))
        for whole, reader in zip(wide, thin, strict=True) if len(wide) == len(thin) else ():
            if counts[id(reader.weight)] == 1 and (reader.bias is None or counts[id(reader.bias)] == 1):
                found_here = filling(known, stays, linear=linear, groups=whole.groups)
                norm = _norm(small, node, reader, coupling)
                outputs = None if is_recurrent(small, node) else checker.masks(checker.old[node.name])
                _Outputs(checker, owners[id(whole.weight)], whole, reader, outputs).give(found_here, norm)
                found[edge.consumer] = None
    return tuple(found)


def _narrowed(edge: Edge, stays: NDArray[np.bool_]) -> Edge:
    return Edge(edge.consumer, edge.source, edge.dim, edge.units[stays], edge.parameter)


def is_recurrent(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a recurrent layer: those are filled in, others are refitted."""
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


def _norm(small: ModelGraph, node: fx.Node, reader: Reader, coupling: Coupling) -> nn.Module | None:
    """The BatchNorm that can take a constant in place of the reader."""
    if is_recurrent(small, node):
        return None
    norm, _ = norm_after(small, node, reader, coupling.specs)
    return None if norm is None else small.get_submodule(str(norm.target))


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """A reader of the original, whose weight is called `owner`, and the narrowed one.

    `masks` say for every axis of what it gives which indices stay; None for recurrent layers, whose rows are gates.
    """

    checker: Checker
    owner: str
    whole: Reader
    reader: Reader
    masks: list[Tensor] | None

    def give(self, found: Filling, norm: nn.Module | None) -> None:
        """Put what the channels that went are predicted to be into the narrowed reader."""
        matrix = self.whole.matrix().double()
        groups, _, inputs, _ = matrix.shape
        moved, constant = torch.zeros_like(matrix), matrix.new_zeros(matrix.shape[:2])
        for group in range(groups):  # a group sees its own channels only
            own = slice(group * inputs, (group + 1) * inputs)
            shares, offset = (torch.from_numpy(x).to(matrix) for x in (found.map[own, own], found.offset[own]))
            moved[group] = torch.einsum("orp,rs->osp", matrix[group], shares)
            constant[group] = matrix[group].sum(-1) @ offset
        weight = from_matrix(moved, tuple(self.whole.weight.shape), transposed=self._transposed)
        self.reader.weight.data += self._kept(weight).to(self.reader.weight)
        add_to_bias(self.reader, norm, self._kept_outputs(constant.reshape(-1)))

    @property
    def _transposed(self) -> bool:
        return self.whole.windows is not None and self.whole.windows.transposed

    def _kept(self, weight: Tensor) -> Tensor:
        """A weight of the original's shape, narrowed as the original's was."""
        return narrow(weight, [self.checker.kept(Slot(self.owner, axis)) for axis in range(weight.ndim)])

    def _kept_outputs(self, constant: Tensor) -> Tensor:
        """Constants of the outputs that stay."""
        mask = self.checker.kept(Slot(self.owner, 0))
        if self.masks is not None:
            mask = self.masks[self.reader.channel_axis]
        return constant if mask is None else constant[mask.to(constant.device)]
