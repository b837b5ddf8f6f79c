"""Compensation: layers that read removed units are refitted in closed form, without training and without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from fxprune.caller.arguments import CHECKS, chosen
from fxprune.caller.batches import Unpack
from fxprune.caller.isolation import device_of, full_float32, kept_buffers, on_device, seeded
from fxprune.caller.meta import need_numbers
from fxprune.caller.ranks import give_from_first
from fxprune.coupling.groups import Key
from fxprune.errors import CalibrationError, PlanError, stage
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.best_graph import BestGraph
from fxprune.recovery.compensation.calibration import Calibration, calibration_of
from fxprune.recovery.compensation.norm_statistics import re_estimate
from fxprune.recovery.compensation.ridge import fill, is_recurrent
from fxprune.recovery.compensation.sequential import refit
from fxprune.reporting.attach import note_compensation
from fxprune.reporting.history import new_biases
from fxprune.reporting.records import Compensation
from fxprune.reporting.report import Pruned
from fxprune.scoring.moments import Moments
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import RECORD, ModelGraph, changed_buffers
from fxprune.tracing.part import Run, part_of, with_part

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
        raise PlanError(
            'compensate="sequential" fits layers to data: pass loader=, such as the one that was scored with'
        )


def with_compensation(
    model: nn.Module, plan: Plan, planned: Planned, small: nn.Module, scores: Scores | None,
    loader: Iterable[Any] | None, level: Level, *, unpack: Unpack | None, run: Run | None, seed: int,
    device: torch.device | str | None, max_samples: int | None = None,
) -> nn.Module:  # fmt: skip
    """`small`, which a plan made of `model`, compensated, with an entry in its report."""
    moments = scores.moments if scores else {}
    check_level(level, moments, loader)
    if level == "none":
        return small
    need_numbers(model, f"compensate={level!r}", CalibrationError)
    with stage("compensating"), seeded(seed), full_float32():
        graph = planned.graph
        part: Any = part_of(small, plan.submodule)
        state = {name: part.get_buffer(name).clone() for name in changed_buffers(graph)}
        with on_device(device, graph, part), kept_buffers(graph):
            data = None
            if loader is not None:
                data = calibration_of(
                    model, graph, loader, submodule=plan.submodule, unpack=unpack, run=run, max_samples=max_samples
                )
            part, done = _compensated(planned, part, level, moments, data, int(seed))
        for name, value in state.items():
            part.get_buffer(name).copy_(value)
        record: Pruned = part.meta[RECORD]
        part.meta[RECORD] = replace(record, history=replace(record.history, biases=new_biases(graph, part)))
        small = with_part(small, plan.submodule, part.to(device_of(graph)))
        note_compensation(small, done, plan.submodule)
        return small


def _compensated(
    planned: Planned, small: ModelGraph, level: str, moments: Mapping[Key, Moments], data: Calibration | None, seed: int
) -> tuple[ModelGraph, Compensation]:
    """A copy of a narrowed graph, compensated; a step is kept only if its outputs are nearer to the original's.

    Where no sample is held out, steps by the moments are kept untested, and nothing is fitted to the data.
    """
    data = data if data is not None and data.judges else None
    best = BestGraph(planned.graph, small, data)

    def fill_in(tried: ModelGraph, *, linear: bool) -> tuple[str, ...]:
        only = partial(is_recurrent, tried) if level == "sequential" else None
        return fill(planned, tried, moments, linear=linear, only=only)

    ways = (False,) if level == "bias" else (True, False)  # by the mean where a linear map does harm
    filled = next((done for linear in ways if (done := best.attempt(partial(fill_in, linear=linear)))), ())
    layers, norms = None, None
    if data is not None:
        if level == "sequential":
            layers = best.attempt(lambda tried: refit(planned, tried, data, seed=seed))
        norms = best.attempt(lambda tried: re_estimate(tried, data))
        if data.ranks > 1:
            give_from_first(best.graph)
    return best.graph, Compensation(level, best.before, best.error, layers or (), filled, norms or 0)
