"""Compensation: closed-form repair of what reads the units that went, without training and without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from numpy.typing import NDArray
from torch import fx, nn

from fxprune.capture import ModelGraph
from fxprune.compensation.batchnorm import norms_of, re_estimate
from fxprune.compensation.calibration import Inputs, distance
from fxprune.compensation.ridge import fill
from fxprune.compensation.sequential import Refit, refit
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.isolation import evaluating
from fxprune.moments import Key, Moments

Level = Literal["none", "bias", "ridge", "sequential"]
LEVELS: tuple[str, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Compensation:
    """What was done about the units that went.

    `before` and `after` are the mean squared errors of the outputs against the original's, in shares of their variance,
    on the calibration samples held out: of plain removal, and of what was handed over; None where there was no loader.
    `layers` are those that were refitted, `filled` the nodes whose weights took over what went, and `norms` the number
    of BatchNorms whose statistics were taken anew.
    """

    level: str
    before: float | None = None
    after: float | None = None
    layers: tuple[Refit, ...] = ()
    filled: tuple[str, ...] = ()
    norms: int = 0


def check_level(level: str, moments: Mapping[Key, Moments], inputs: object) -> None:
    """Raise where a level of compensation is unknown, or lacks what it works with."""
    if level not in LEVELS:
        raise PlanError(f"compensate is {level!r}; it is one of {', '.join(LEVELS)}")
    if level in ("bias", "ridge") and not moments:
        raise PlanError(
            f"compensate={level!r} works with the moments of the scoring pass: pass scores= from fxprune.score"
        )
    if level == "sequential" and inputs is None:
        raise PlanError('compensate="sequential" fits layers to data: pass loader=, the one that was scored with, say')


def compensated(
    graph: ModelGraph,
    small: ModelGraph,
    coupling: Coupling,
    keep: NDArray[Any],
    *,
    level: str,
    moments: Mapping[Key, Moments],
    inputs: Sequence[Inputs] | None,
    seed: int = 0,
) -> tuple[ModelGraph, Compensation]:
    """A copy of `small`, compensated; each step is kept only where it brings the outputs nearer to the original's.

    Args:
        graph, small: the original and the rewritten graph; neither is changed.
        level: "bias", "ridge" or "sequential".
        moments: those of the scoring pass.
        inputs: for each calibration batch, the values of the placeholders; None where every step is to be kept unseen.
        seed: of the positions that "sequential" samples.
    """
    done = Compensation(level)
    best, least = small, distance(graph, small, inputs) if inputs else None
    plain = least

    def attempt(change: Callable[[ModelGraph], None]) -> bool:
        nonlocal best, least
        tried = copy.deepcopy(best)
        with torch.no_grad(), evaluating(tried), evaluating(graph):
            change(tried)
        error = distance(graph, tried, inputs) if inputs else None
        if error is not None and least is not None and not error < least:
            return False
        best, least = tried, error
        return True

    layers: tuple[Refit, ...] = ()
    filled: tuple[str, ...] = ()

    def fill_in(tried: ModelGraph) -> None:
        nonlocal filled
        only = _is_recurrent(graph) if level == "sequential" else None
        filled = fill(graph, tried, coupling, keep, moments, linear=level != "bias", only=only)

    def fit(tried: ModelGraph) -> None:
        nonlocal layers
        layers = refit(graph, tried, coupling, keep, inputs or (), seed=seed)

    filled = filled if attempt(fill_in) else ()
    if level == "sequential":
        layers = layers if attempt(fit) else ()
    norms = (
        len(norms_of(best)) if inputs and norms_of(best) and attempt(lambda tried: re_estimate(tried, inputs)) else 0
    )
    done = Compensation(level, plain, least, layers, filled, norms)
    return best, done


def _is_recurrent(graph: fx.GraphModule) -> Callable[[fx.Node], bool]:
    """Whether a node calls a recurrent layer: those are filled in, others are refitted."""

    def calls(node: fx.Node) -> bool:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, nn.RNNBase | nn.RNNCellBase)

    return calls
