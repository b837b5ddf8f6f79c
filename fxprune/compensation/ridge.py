"""Bias and ridge: what readers lose is predicted from what stays, by the moments of the scoring pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxprune.capture import ModelGraph
from fxprune.compensation.biases import add_to_bias
from fxprune.compensation.targets import norm_after
from fxprune.coupling import Coupling, Edge
from fxprune.moments import Key, Moments
from fxprune.ranking import key_of_edge
from fxprune.readers import Reader, from_matrix, readers_on
from fxprune.rewrite import Checker, narrow
from fxprune.rules.context import Slot

STRENGTH = 1e-3  # of the ridge, by the mean variance of the channels that stay


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """How the channels that go follow from those that stay: gone = stay @ map.T + offset, by their places on an edge."""

    stay: NDArray[np.int64]
    gone: NDArray[np.int64]
    map: NDArray[np.float64]
    offset: NDArray[np.float64]


def filling(moments: Moments, stays: NDArray[np.bool_], *, linear: bool) -> Filling:
    """The ridge regression of the channels that go on those that stay; of their means alone where not `linear`.

    >>> moments = Moments(np.array([1.0, 2.0]), np.array([[1.0, 2.0], [2.0, 4.0]]))
    >>> filling(moments, np.array([True, False]), linear=True).map.round(2)
    array([[2.]])
    """
    stay, gone = np.flatnonzero(stays), np.flatnonzero(~stays)
    shares = np.zeros((len(gone), len(stay)))
    if linear and moments.covariance.ndim == 2 and len(stay):
        own = moments.covariance[np.ix_(stay, stay)]
        ridge = STRENGTH * max(float(np.trace(own)) / len(stay), np.finfo(float).tiny)
        shares = np.linalg.solve(own + ridge * np.eye(len(stay)), moments.covariance[np.ix_(stay, gone)]).T
    return Filling(stay, gone, shares, moments.mean[gone] - shares @ moments.mean[stay])


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
        only: which nodes of `graph` to go over; all where it is None.
    """
    checker, padded = Checker(graph, coupling, keep), np.append(keep, True)
    owners = {id(parameter): name for name, parameter in graph.named_parameters()}
    shared = _shared(small)
    nodes = {node.name: node for node in graph.graph.nodes}
    found = dict[str, None]()
    for edge in coupling.edges:
        stays = padded[edge.units]
        known = moments.get(key_of_edge(edge))
        if known is None or bool(stays.all()) or (only and not only(nodes[edge.consumer])):
            continue
        pairs = zip(readers_on(graph, edge), readers_on(small, _narrowed(edge, stays)), strict=True)
        for whole, narrow_ in pairs:
            if id(narrow_.weight) not in shared:
                outputs = _Outputs(checker, owners, whole, small, edge)
                outputs.give(narrow_, filling(known, stays, linear=linear), stays)
                found[edge.consumer] = None
    return tuple(found)


def _shared(small: nn.Module) -> set[int]:
    """The ids of parameters that several layers have, or a layer that is called several times."""
    counts: dict[int, int] = {}
    for _, parameter in small.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def _narrowed(edge: Edge, stays: NDArray[np.bool_]) -> Edge:
    return Edge(edge.consumer, edge.source, edge.dim, edge.units[stays], edge.parameter)


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """A reader of the original, and where what it computes went."""

    checker: Checker
    owners: Mapping[int, str]
    whole: Reader
    small: ModelGraph
    edge: Edge

    def give(self, reader: Reader, found: Filling, stays: NDArray[np.bool_]) -> None:
        """Put what the channels that went are predicted to be into the narrowed reader."""
        matrix = self.whole.matrix().double()
        groups, _, inputs, _ = matrix.shape
        places = torch.arange(groups * inputs).reshape(groups, inputs)
        moved = torch.zeros_like(matrix)
        constant = torch.zeros(matrix.shape[:2], dtype=torch.float64, device=matrix.device)
        shares = torch.zeros(groups * inputs, groups * inputs, dtype=torch.float64)
        shares[np.ix_(found.gone, found.stay)] = torch.from_numpy(found.map)
        offset = torch.zeros(groups * inputs, dtype=torch.float64)
        offset[found.gone] = torch.from_numpy(found.offset)
        for group, own in enumerate(places):  # a group sees its own channels only
            part = shares[own][:, own].to(matrix.device)
            moved[group] = torch.einsum("orp,rs->osp", matrix[group], part)
            constant[group] = matrix[group].sum(-1) @ offset[own].to(matrix.device)
        weight = from_matrix(moved, tuple(self.whole.weight.shape), transposed=self._transposed)
        reader.weight.data += self._kept(weight).to(reader.weight)
        node = next(node for node in self.small.graph.nodes if node.name == self.edge.consumer)
        norm_node, _ = norm_after(self.small, node)
        norm = None if norm_node is None else self.small.get_submodule(str(norm_node.target))
        add_to_bias(reader, norm, self._kept_outputs(constant.reshape(-1)))

    @property
    def _transposed(self) -> bool:
        return self.whole.windows is not None and self.whole.windows.transposed

    def _kept(self, weight: Tensor) -> Tensor:
        """A weight of the original's shape, narrowed as the original's was."""
        owner = self.owners[id(self.whole.weight)]
        return narrow(weight, [self.checker.kept(Slot(owner, axis)) for axis in range(weight.ndim)])

    def _kept_outputs(self, constant: Tensor) -> Tensor:
        """Constants of the outputs that stay."""
        owner = self.owners[id(self.whole.weight)]
        if self._transposed and self.whole.groups > 1:
            mask = self.checker.kept(Slot(owner, "out"))
        else:
            mask = self.checker.kept(Slot(owner, int(self._transposed)))
        return constant if mask is None else constant[mask.to(constant.device)]
