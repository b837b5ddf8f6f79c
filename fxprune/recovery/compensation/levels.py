"""Compensation: layers that read removed units are refitted in closed form, without training and without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from numpy.typing import NDArray

from fxprune.caller.arguments import CHECKS, chosen
from fxprune.caller.isolation import evaluating, in_eval_mode
from fxprune.caller.ranks import give_from_first
from fxprune.coupling.groups import Coupling, Key
from fxprune.errors import PlanError
from fxprune.recovery.compensation.calibration import Calibration
from fxprune.recovery.compensation.judge import Judge
from fxprune.recovery.compensation.norm_statistics import re_estimate
from fxprune.recovery.compensation.ridge import fill, is_recurrent
from fxprune.recovery.compensation.sequential import refit
from fxprune.reporting.records import Compensation, Refit
from fxprune.scoring.moments import Moments
from fxprune.tracing.graph import ModelGraph

Level = Literal["none", "bias", "ridge", "sequential"]
LEVELS: tuple[str, ...] = get_args(Level)
CHECKS["compensate"] = chosen(LEVELS, PlanError)


def check_level(level: str, moments: Mapping[Key, Moments] | None, loader: object) -> None:
    """Raise where a level of compensation lacks its moments or its data; moments of None are known later."""
    if level in ("bias", "ridge") and moments is not None and not moments:
        raise PlanError(
            f"compensate={level!r} works with the moments of the scoring pass: pass scores= from fxprune.score"
        )
    if level == "sequential" and loader is None:
        raise PlanError('compensate="sequential" fits layers to data: pass loader=, the one that was scored with, say')


def compensated(
    graph: ModelGraph,
    small: ModelGraph,
    coupling: Coupling,
    keep: NDArray[Any],
    *,
    level: str,
    moments: Mapping[Key, Moments],
    data: Calibration | None,
    seed: int = 0,
) -> tuple[ModelGraph, Compensation]:
    """A copy of `small`, compensated; each step is kept only where it brings the outputs nearer to the original's.

    Where no sample is held out, steps by the moments are kept untested, and nothing is fitted to the data.

    Args:
        graph, small: the original and the rewritten graph; neither is changed.
        level: "bias", "ridge" or "sequential".
        moments: from the scoring pass.
        data: the calibration batches, or None.
        seed: of the positions that "sequential" samples.
    """
    data = data if data is not None and data.judges else None
    best = _Best(graph, small, None if data is None else Judge(graph, data))

    def fill_in(tried: ModelGraph, *, linear: bool) -> tuple[str, ...]:
        only = (lambda node: is_recurrent(tried, node)) if level == "sequential" else None
        return fill(graph, tried, coupling, keep, moments, linear=linear, only=only)

    ways = (False,) if level == "bias" else (True, False)  # by the mean where a linear map does harm
    filled = next((done for linear in ways if (done := best.attempt(partial(fill_in, linear=linear)))), ())
    layers: tuple[Refit, ...] = ()
    norms = 0
    if data is not None:
        if level == "sequential":
            layers = best.attempt(lambda tried: refit(graph, tried, coupling, keep, data, seed=seed)) or ()
        norms = best.attempt(lambda tried: re_estimate(tried, data)) or 0
        if data.ranks > 1:
            give_from_first(best.graph)
    return best.graph, Compensation(level, best.before, best.error, layers, filled, norms)


class _Best:
    """The best graph so far, by its error on the samples held out; without such, the latest."""

    def __init__(self, original: ModelGraph, small: ModelGraph, judge: Judge | None) -> None:
        self.original, self.graph, self.judge = original, small, judge
        self.before = self.error = None if judge is None else judge.error(small)

    def attempt(self, change: Callable[[ModelGraph], Any]) -> Any:
        """The result of a change of a copy of the graph, if the change was kept; otherwise None."""
        tried = copy.deepcopy(self.graph)
        with torch.no_grad(), in_eval_mode(tried), evaluating(self.original):
            done = change(tried)
        if not done:
            return None
        if self.judge is not None and self.error is not None:
            error = self.judge.error(tried)
            if not error < self.error:
                return None
            self.error = error
        self.graph = tried
        return done
