"""The whole model without numbers: its units, their costs, and the fields of the configuration that say them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fxprune.caller.batches import batches
from fxprune.caller.isolation import undisturbed
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.errors import stage
from fxprune.integrations.blockwise.source import Source
from fxprune.integrations.huggingface import arguments_of, columns
from fxprune.integrations.plain import Change, changes_of, limits_by
from fxprune.integrations.plain_options import multiples
from fxprune.planning.allocation import RoundTo
from fxprune.rewriting.class_limits import keep_to
from fxprune.scoring.scores import Scores, scores_of
from fxprune.tracing.capture import capture
from fxprune.tracing.graph import ClassLimits, captured_of


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """The coupling of a model, what its class can run narrower, the changes of its configuration, and empty scores.

    `free` is the coupling before the class limits it, whose groups the changes number. `coupled` are the options of
    both.
    """

    free: Coupling
    coupling: Coupling
    limits: ClassLimits
    changes: Sequence[Change]
    scores: Scores
    coupled: Mapping[str, Any]


def whole_of(source: Source, loader: Iterable[Any], round_to: RoundTo, coupled: Mapping[str, Any]) -> Whole:
    """The whole model, captured on shapes alone.

    Raises:
        NarrowError: no field of its configuration says the widths of its layers.
    """
    unpack = partial(columns, *arguments_of(type(source.model)), None)
    example = next(iter(batches(loader, unpack)))[0]
    graph: Any = capture(source.model, example)
    with stage("coupling"), undisturbed():
        changes = changes_of(source.model, free := analyse(graph, **coupled))
        keep_to(graph, limits_by(changes, free, source.model.config))
        coupling = analyse(graph, **coupled)
        zeros, about = np.zeros(coupling.units), {"propose": "reconstruction", "protect": "taylor-by-sample"}
        scores = scores_of(graph, coupling, (zeros, zeros), coupled, about)
    scores = replace(scores, equal_blocks=True, round_to=multiples(changes, free, round_to))
    return Whole(free, coupling, captured_of(graph).limits, changes, scores, coupled)
