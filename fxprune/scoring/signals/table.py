"""Signals: what the units of a network are ranked by, by name or by a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fxprune.caller.arguments import CHECKS, chosen
from fxprune.caller.arrays import Scalars
from fxprune.coupling.groups import Edge
from fxprune.coupling.readers import readers_on
from fxprune.errors import CalibrationError, blaming
from fxprune.rules.vocabulary import Slot
from fxprune.scoring.evidence import Evidence
from fxprune.scoring.moments import Moments
from fxprune.scoring.signals.reconstruction import Reading, eliminated

WIDE = 2048  # channels of an edge, above which none stands in for another


Signal = Callable[[Evidence], Scalars]
SIGNALS: dict[str, Signal] = {}
CHECKS |= dict.fromkeys(
    ("propose", "protect"), chosen(SIGNALS, CalibrationError, "a function from fxprune.Evidence to one number a unit")
)


def signal(name: str) -> Callable[[Signal], Signal]:
    """Register the decorated function as the signal of a name."""

    def register(function: Signal) -> Signal:
        SIGNALS[name] = function
        return function

    return register


def ranked(by: str | Signal, evidence: Evidence) -> Scalars:
    """One number for each unit, the lowest for the one to go first, by a named signal or one of the caller's.

    Raises CalibrationError where a caller's signal does not give one number a unit.
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


@signal("separability")
def separability(evidence: Evidence) -> Scalars:
    """U-Score: the largest distance between the activations of two classes (arXiv 2508.02291)."""
    if evidence.separability is None:
        raise CalibrationError('the U-Score was not gathered: ask for it by its name, "separability"')
    return evidence.separability


@signal("taylor")
def taylor(evidence: Evidence) -> Scalars:
    """R-Score: the size of the first-order change of the loss when a unit goes, by reader (arXiv 2508.02291)."""
    return evidence.taylor


@signal("taylor-by-sample")
def taylor_by_sample(evidence: Evidence) -> Scalars:
    """The size of the first-order change of each sample's loss when a unit goes, by reader (arXiv 1611.06440, eq. 8).

    Near a minimum of the loss, those of all samples cancel; their sizes do not.
    """
    return evidence.taylor_by_sample


@signal("reconstruction")
def reconstruction(evidence: Evidence) -> Scalars:
    """The error in what reads the units that is left once others stand in for them, when units go one after another.

    Of every edge, the share of its readers' output variance that no linear map of the units that stay can give back.
    In each group the unit that costs least goes first, and the costs add up (the order of Optimal Brain Surgeon).
    """
    result = np.zeros(evidence.coupling.units)
    readings = [_reading(evidence, edge, moments) for edge, moments in evidence.edges if moments is not None]
    for group in evidence.coupling.prunable:
        own = range(group.units.start, group.units.stop)
        result[own.start : own.stop] = eliminated([r.within(own) for r in readings], len(own))
    return result


def _reading(evidence: Evidence, edge: Edge, moments: Moments) -> Reading:
    """What an edge's readers make of its channels; of a wide edge, channel by channel."""
    readers, count = readers_on(evidence.graph, edge), len(edge.units)
    if count > WIDE or moments.covariance.ndim == 1:
        squares = [reader.squares() for reader in readers] or [np.ones(count)]
        return Reading(edge.units, moments.variance, np.sum(squares, axis=0))
    products = [reader.products() for reader in readers] or [np.eye(count)]
    return Reading(edge.units, moments.covariance, np.sum(products, axis=0))


@signal("activation")
def activation(evidence: Evidence) -> Scalars:
    """The root mean square of what is read of a unit, summed over its readers."""
    result = np.zeros(evidence.coupling.units + 1)
    for edge, moments in evidence.edges:
        if moments is not None:
            np.add.at(result, edge.units, np.sqrt(np.maximum(moments.mean**2 + moments.variance, 0)))
    return result[:-1]


@signal("magnitude")
def magnitude(evidence: Evidence) -> Scalars:
    """The L2 norm of all weights that would go with a unit: filters, columns, and entries of norms."""
    coupling = evidence.coupling
    result = np.zeros(coupling.units + 1)
    for name, parameter in evidence.graph.named_parameters():
        for axis in range(parameter.ndim):
            start, size = coupling.slots.get(Slot(name, axis), (0, 0))
            if size == parameter.shape[axis]:
                squares = parameter.detach().double().square().movedim(axis, 0).reshape(size, -1).sum(1)
                units = coupling.unit_of[start : start + size]
                np.add.at(result, np.where(units < coupling.units, units, -1), squares.cpu().numpy())
    return np.sqrt(result[:-1])


@signal("random")
def random(evidence: Evidence) -> Scalars:
    """Seeded random numbers: what any other signal has to beat."""
    found: Scalars = np.random.default_rng(evidence.seed).random(evidence.coupling.units)
    return found


def name_of_signal(by: str | Signal) -> str:
    """What a signal is called."""
    return by if isinstance(by, str) else str(getattr(by, "__name__", type(by).__name__))


def need_classes(signals: Sequence[str | Signal]) -> bool:
    """Whether one of the signals compares classes."""
    return "separability" in signals
