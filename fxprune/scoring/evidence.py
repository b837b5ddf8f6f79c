"""What the scoring pass saw, unit by unit: what signals rank by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.arrays import Scalars
from fxprune.coupling.groups import Coupling, Edge, Key, key_of_edge
from fxprune.errors import CalibrationError
from fxprune.scoring.moments import Moments
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import Sampler
from fxprune.scoring.signals.separability import separability
from fxprune.tracing.graph import ModelGraph


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the scoring pass saw, for signals to make one number a unit from.

    `taylor` (units,) is the size of the derivative of the loss, summed over the samples, by a factor on what a reader
    reads of a unit, summed over its readers. `taylor_by_sample` (units,) takes the size of each sample's own.
    `separability` (units,) is the U-Score; it is there only where a signal of that name was asked for. `moments` are
    those of every edge that sees activations.
    """

    graph: ModelGraph
    coupling: Coupling
    taylor: Scalars
    taylor_by_sample: Scalars
    moments: Mapping[Key, Moments]
    separability: Scalars | None
    seed: int

    @property
    def edges(self) -> list[tuple[Edge, Moments | None]]:
        """The edges that read units which may go, each with its moments."""
        edges = [edge for edge in self.coupling.edges if (edge.units >= 0).any()]
        return [(edge, self.moments.get(key_of_edge(edge))) for edge in edges]


def evidence_of(
    graph: ModelGraph, coupling: Coupling, probes: Sequence[Probe], totals: Sequence[Tensor], sampler: Sampler
) -> Evidence:
    """What probes, the sums of their gradients and a sampler hold at the end of a pass.

    Raises CalibrationError where a number of it is not finite.
    """
    sums = _unit_sums(probes, totals, coupling.units)
    separable = _separabilities(probes, sampler, coupling.units) if sampler.compares else None
    return Evidence(graph, coupling, *sums, _moments(probes), separable, sampler.draw.seed)


def _unit_sums(probes: Sequence[Probe], totals: Sequence[Tensor], units: int) -> tuple[Scalars, Scalars]:
    """Of a unit's derivatives on an edge, the size of their sum, and the sum of their sizes; summed over the edges.

    What one reader gains and another loses does not cancel: compensation repairs each reader by itself.
    """
    sums, sizes = np.zeros(units + 1), np.zeros(units + 1)
    for probe, total in zip(probes, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                f"a gradient on the edge {probe.reads} is not finite: look for overflow in the model or the loss"
            )
        own = np.zeros(units + 1)
        of_positions, of_units = np.split(total.numpy(), [len(probe.units)])
        np.add.at(own, probe.units, of_positions)
        sums += np.abs(own)
        sizes[probe.own] += of_units
    return sums[:-1], sizes[:-1]


def _moments(probes: Sequence[Probe]) -> dict[Key, Moments]:
    """The moments of every edge that saw activations."""
    found = {p.key: p.gathering.moments() for p in probes if p.gathering is not None and p.gathering.rows}
    for probe in probes:
        if probe.key in found and not np.isfinite(found[probe.key].covariance).all():
            raise CalibrationError(
                f"an activation on the edge {probe.reads} is not finite: look for overflow in the model"
            )
    return found


def _separabilities(probes: Sequence[Probe], sampler: Sampler, units: int) -> Scalars:
    """The U-Score of each unit, summed over the edges that read it."""
    result = np.zeros(units)
    compared = torch.tensor(sorted(sampler.counts), dtype=torch.int64)
    for probe in probes:
        if not probe.samples:  # it reads through a weight, and sees no activations
            continue
        samples, labels = probe.stored()
        chosen = torch.isin(labels, compared)
        found = separability(samples[chosen], labels[chosen]).double().numpy()
        if not np.isfinite(found).all():
            raise CalibrationError(
                f"an activation on the edge {probe.reads} is not finite: look for overflow in the model"
            )
        result[probe.own] += found
        probe.samples.clear()
        probe.labels.clear()
    return result
