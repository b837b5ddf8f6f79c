"""A plan in the terms of a graph: its coupling, and the units that it keeps."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fxprune.caller.arrays import Flags
from fxprune.coupling.groups import Coupling
from fxprune.planning.plan import Plan, coupling_of, kept_units
from fxprune.tracing.capture import captured
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.part import part_of


class Planned(NamedTuple):
    """A captured graph, its coupling, and the units that a plan keeps, one bool per unit."""

    graph: ModelGraph
    coupling: Coupling
    keep: Flags


def planned_by(model: nn.Module, plan: Plan) -> Planned:
    """The graph that a plan is for, its coupling, and the units that the plan keeps."""
    part = part_of(model, plan.submodule)
    graph = captured(plan.settings, part, plan.example)
    coupling = coupling_of(graph, plan)
    return Planned(graph, coupling, kept_units(plan, coupling))
