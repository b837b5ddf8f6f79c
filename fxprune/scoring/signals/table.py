"""Signals assign one number to each unit; units are ranked by them. They have names, or are the caller's functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
import torch

from fxprune.caller.arguments import CHECKS, chosen
from fxprune.caller.arrays import Scalars
from fxprune.coupling.groups import Coupling, Edge, Key, key_of_edge
from fxprune.coupling.readers import experts_on, readers_on
from fxprune.errors import CalibrationError, blaming
from fxprune.rules.vocabulary import Slot
from fxprune.scoring.evidence import Evidence
from fxprune.scoring.moments import Moments
from fxprune.scoring.signals.reconstruction import EdgeStatistics, elimination_costs
from fxprune.tracing.graph import ModelGraph

SINGLE = 2048  # channels of an edge above which numbers are of single precision
Signal = Callable[[Evidence], Scalars]


def ranked(by: str | Signal, evidence: Evidence) -> Scalars:
    """One number for each unit, lowest for the first to be removed, by a named signal or one of the caller's.

    Raises CalibrationError where a caller's signal does not give one finite number a unit.
    """
    with blaming(f"the signal {name_of_signal(by)}", "what scoring found"):
        found = np.asarray((SIGNALS[by] if isinstance(by, str) else by)(evidence), dtype=np.float64)
    if found.shape != (evidence.coupling.units,) or not np.isfinite(found).all():
        raise CalibrationError(
            f"the signal {name_of_signal(by)} gives shape {found.shape}, "
            f"{int((~np.isfinite(found)).sum())} of it not finite, for {evidence.coupling.units} units: "
            "give one finite number a unit"
        )
    return found


def separability(evidence: Evidence) -> Scalars:
    """U-Score: the largest distance between the activations of two classes (arXiv 2508.02291)."""
    if evidence.separability is None:
        raise CalibrationError('the U-Score was not gathered: ask for it by its name, "separability"')
    return evidence.separability


def taylor(evidence: Evidence) -> Scalars:
    """R-Score: the size of the first-order change of the loss without a unit, by reader (arXiv 2508.02291)."""
    return evidence.taylor


def taylor_by_sample(evidence: Evidence) -> Scalars:
    """The size of the first-order change of each sample's loss without a unit, by reader (arXiv 1611.06440, eq. 8).

    Near a minimum of the loss the changes of all samples cancel; their sizes do not.
    """
    return evidence.taylor_by_sample


def reconstruction(evidence: Evidence) -> Scalars:
    """The error of a unit's readers that remains once the kept units replace it, when units are removed one by one.

    On every edge it is the share of the readers' output variance that no linear map of the kept units explains. In each
    group the unit that costs least is removed first, and the costs add up (the order of Optimal Brain Surgeon).
    """
    result = np.zeros(evidence.coupling.units)
    edges = [_statistics(evidence, edge, moments) for edge, moments in evidence.edges if moments is not None]
    for group in evidence.coupling.prunable:
        own = range(group.units.start, group.units.stop)
        result[own.start : own.stop] = elimination_costs([e.within(own) for e in edges], len(own))
    return result


def _statistics(evidence: Evidence, edge: Edge, moments: Moments) -> EdgeStatistics:
    """The moments of an edge and the weights of its readers; channel by channel where no covariance was kept."""
    readers = readers_on(evidence.graph, edge) or experts_on(evidence.graph, edge)
    count = len(edge.units)
    if edge.chosen is not None:  # how strongly each expert is used, over all rows: no other takes its place
        return EdgeStatistics(edge.units, moments.mean, np.ones(count))
    if moments.covariance.ndim == 1:
        squares = [reader.squares() for reader in readers] or [np.ones(count)]
        return EdgeStatistics(edge.units, moments.variance, np.sum(squares, axis=0))
    precision = torch.float32 if count > SINGLE else torch.float64
    products = [reader.products(precision) for reader in readers] or [np.eye(count)]
    covariance = moments.covariance.astype(np.float32 if count > SINGLE else np.float64)
    return EdgeStatistics(edge.units, covariance, reduce(np.add, products).astype(covariance.dtype, copy=False))


def activation(evidence: Evidence) -> Scalars:
    """The root mean square of a unit's activations, summed over its readers."""
    return activations(evidence.coupling, evidence.moments)


def activations(coupling: Coupling, moments: Mapping[Key, Moments]) -> Scalars:
    """The root mean square of the activations of each unit, by the moments of the edges that read them."""
    result = np.zeros(coupling.units + 1)
    for edge in coupling.edges:
        if (known := moments.get(key_of_edge(edge))) is not None:
            np.add.at(result, edge.units, np.sqrt(np.maximum(known.mean**2 + known.variance, 0)))
    return result[:-1]


def magnitude(evidence: Evidence) -> Scalars:
    """The L2 norm of all weights that are removed with a unit: filters, columns, and entries of norms."""
    return magnitudes(evidence.graph, evidence.coupling)


def magnitudes(graph: ModelGraph, coupling: Coupling) -> Scalars:
    """The L2 norm of the weights of each unit of a graph."""
    result = np.zeros(coupling.units + 1)
    for name, parameter in graph.named_parameters():
        for axis in range(parameter.ndim):
            start, size = coupling.slots.get(Slot(name, axis), (0, 0))
            if 0 < size == parameter.shape[axis]:
                squares = parameter.detach().double().square().movedim(axis, 0).reshape(size, -1).sum(1)
                units = coupling.unit_of[start : start + size]
                np.add.at(result, np.where(units < coupling.units, units, -1), squares.cpu().numpy())
    return np.sqrt(result[:-1])


def random(evidence: Evidence) -> Scalars:
    """Seeded random numbers: the baseline for all other signals."""
    return np.random.default_rng(evidence.seed).random(evidence.coupling.units)


def name_of_signal(by: str | Signal) -> str:
    """The name of a signal."""
    return by if isinstance(by, str) else str(getattr(by, "__name__", type(by).__name__))


SIGNALS: dict[str, Signal] = {
    "separability": separability, "taylor": taylor, "taylor-by-sample": taylor_by_sample,
    "reconstruction": reconstruction, "activation": activation, "magnitude": magnitude, "random": random,
}  # fmt: skip
CHECKS |= dict.fromkeys(
    ("propose", "protect"), chosen(SIGNALS, CalibrationError, "a function from fxprune.Evidence to one number a unit")
)
