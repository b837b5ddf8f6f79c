"""Evidence: all that the scoring pass measured, unit by unit; signals rank by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.arrays import Scalars
from fxprune.coupling.groups import Coupling, Edge, Key, key_of_edge
from fxprune.errors import CalibrationError, plural
from fxprune.scoring.moments import Moments
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import Sampler
from fxprune.scoring.signals.separability import separability
from fxprune.tracing.graph import ModelGraph


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the scoring pass measured; a signal computes one number for each unit from it.

    For each reader of a unit, take the derivative of the loss with respect to a factor on the unit's values that this
    reader sees. `taylor` (units,) is the absolute derivative of the loss of all samples, summed over the readers.
    `taylor_by_sample` (units,) sums the absolute derivatives of the samples' losses instead. `separability` (units,) is
    the U-Score, or None where no signal of that name was asked for. `moments` are those of every edge that sees
    activations.
    """

    graph: ModelGraph
    coupling: Coupling
    taylor: Scalars
    taylor_by_sample: Scalars
    moments: Mapping[Key, Moments]
    separability: Scalars | None
    seed: int

    def __repr__(self) -> str:
        moments = plural(len(self.moments), "edge")
        return f"<evidence of {type(self.graph).__name__}: moments of {moments}, {self.coupling}>"

    @property
    def edges(self) -> list[tuple[Edge, Moments | None]]:
        """The edges that read prunable units, each with its moments."""
        edges = [edge for edge in self.coupling.edges if (edge.units >= 0).any()]
        return [(edge, self.moments.get(key_of_edge(edge))) for edge in edges]


def evidence_of(
    graph: ModelGraph, coupling: Coupling, probes: Sequence[Probe], totals: Sequence[Tensor], sampler: Sampler
) -> Evidence:
    """The evidence of a finished pass: of its probes, the sums of their gradients, and its sampler.

    Raises CalibrationError where a number of it is not finite.
    """
    taylor, by_sample, separable = (np.zeros(coupling.units + 1) for _ in range(3))
    for probe, total in zip(probes, totals, strict=True):
        _check_finite(total.numpy(), "a gradient", probe, " or the loss")
        own = np.zeros(coupling.units + 1)
        of_positions, of_units = np.split(total.numpy(), [len(probe.units)])
        np.add.at(own, probe.units, of_positions)
        taylor += np.abs(own)  # the gain of one reader does not cancel the loss of another: each is refitted by itself
        by_sample[probe.own] += of_units
    moments = dict[Key, Moments]()
    compared = torch.tensor(sorted(sampler.counts), dtype=torch.int64)
    for probe in probes:
        if probe.samples.parts:
            chosen = torch.isin(probe.samples.labels, compared)
            samples = probe.samples.joined(sampler.projections)[chosen]
            found = separability(samples, probe.samples.labels[chosen]).double().numpy()
            _check_finite(found, "an activation", probe)
            separable[probe.own] += found
            probe.samples.parts.clear()
        if probe.moment_sums is not None and probe.moment_sums.rows:
            moments[probe.key] = probe.moment_sums.moments()
            _check_finite(moments[probe.key].covariance, "an activation", probe)
    scores = separable[:-1] if sampler.compares else None
    return Evidence(graph, coupling, taylor[:-1], by_sample[:-1], moments, scores, sampler.seed)


def usage_of_experts(coupling: Coupling, moments: Mapping[Key, Moments]) -> dict[str, list[float]]:
    """How much each expert of a router is used: the mean size of its weighted outputs over all rows, in shares."""
    keys = {router.site: router.key for router in coupling.routers if router.key is not None}
    known = {name: moments[key].mean for name, key in keys.items() if key in moments}
    return {name: (mean / max(float(mean.sum()), np.finfo(float).tiny)).tolist() for name, mean in known.items()}


def _check_finite(numbers: Scalars, of: str, probe: Probe, places: str = "") -> None:
    if not np.isfinite(numbers).all():
        raise CalibrationError(f"{of} on the edge {probe.reads} is not finite: look for overflow in the model{places}")
