"""The options of `compress` for a plain model: those that it cannot have, its multiples, and what helps a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from fxprune.caller.arguments import CHECKS
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.errors import NarrowError, PlanError, UnreachableError
from fxprune.integrations.plain import OWN_CLASS, Change, changes_of
from fxprune.planning.allocation import RoundTo
from fxprune.planning.budgets import INEXACT

_NEEDED = {
    "submodule": ("", "the configuration is that of the whole model"),
    "equal_blocks": (True, "the classes of transformers build all layers by one configuration"),
    "new_biases": (False, "the class has no place for them"),
    "own_class": (True, "a plain model is one of its own class"),
}


def others(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a caller without those that a plain model leaves no choice of.

    Raises:
        NarrowError: one of these has another value than a plain model needs.
    """
    for name, (value, why) in _NEEDED.items():
        if options.get(name, value) != value:
            raise NarrowError(f"plain=True needs {name}={value!r}: {why}")
    return {name: value for name, value in options.items() if name not in _NEEDED}


def check_inexact(model: PreTrainedModel, graph: Any, coupled: Mapping[str, Any]) -> None:
    """Raise NarrowError where `inexact=True` is asked for, and a plain model has no use of it."""
    if coupled.get("inexact") and not inexact_helps(model, graph, coupled):
        raise NarrowError(
            f"inexact=True prunes nothing more of a plain model: no field of {type(model.config).__name__} says the "
            "width of the channels that it frees, such as those of the residual stream, alone; leave it out, or leave "
            "out plain=True"
        )


def inexact_helps(model: PreTrainedModel, graph: Any, coupled: Mapping[str, Any]) -> bool:
    """Whether `inexact=True` frees channels whose width the configuration says."""
    exact, freed = (analyse(graph, **{**coupled, "inexact": value}) for value in (False, True))
    known = {site.name for group in exact.prunable for site in group.sites}
    try:
        numbers = [number for change in changes_of(model, freed) for number in change.groups]
    except NarrowError:
        return False
    return not {site.name for number in numbers for site in freed.prunable[number].sites} <= known


def multiples(changes: Sequence[Change], coupling: Coupling, round_to: RoundTo) -> dict[str, int]:
    """The multiples that a caller asks for, raised to those that a class needs.

    Raises:
        PlanError: `round_to` is no multiple, names a kind of units that the model lacks, or more than all units of one.
    """
    CHECKS["round_to"]("round_to", round_to)
    widest = {change.kind: max(c.units for c in changes if c.kind == change.kind) for change in changes}
    asked = dict(round_to) if isinstance(round_to, Mapping) else dict.fromkeys(widest, round_to)
    units = ", ".join(f"{width} {kind!r}" for kind, width in widest.items())
    if lacking := asked.keys() - {group.kind for group in coupling.prunable}:
        raise PlanError(f"round_to: the model has no prunable units of the kind {min(lacking)!r}; it has {units}")
    kinds = dict(asked)
    for change in changes:
        kinds[change.kind] = math.lcm(kinds.get(change.kind, 1), change.step)
    for kind, width in widest.items():
        if kinds[kind] > width and asked.get(kind, 1) > 1:
            stepped = f" (with the steps of its class, {kinds[kind]})" * (kinds[kind] > asked[kind])
            raise PlanError(
                f"round_to: {asked[kind]}{stepped} is more than the {width} {kind!r} of a layer, none of which could "
                f"be removed; the model has {units}: give a multiple for each kind, such as {{{kind!r}: 1}}"
            )
    return kinds


def advised(error: UnreachableError, options: Mapping[str, Any], *, held: bool, inexact: bool) -> UnreachableError:
    """The error of a budget that a plain model cannot reach, with what helps there.

    Args:
        error: that of `compress`.
        options: those of the caller; the multiples of `compress` are raised to the steps of the class.
        held: whether layers are kept whole because the configuration cannot say their width.
        inexact: whether `inexact=True` would help.
    """
    asked, remedies = options.get("round_to", 1), list[str]()
    for remedy in error.remedies:
        if remedy.startswith("lower round_to="):
            least = asked == 1 or (isinstance(asked, Mapping) and set(asked.values()) <= {1})
            remedies += [] if least else [f"lower round_to={asked}"]
        elif remedy.startswith("raise ") and held:
            remedies += [OWN_CLASS, remedy]
        elif remedy != INEXACT or inexact:
            remedies.append(remedy)
    return UnreachableError(error.asked, remedies)
