"""Compensation: layers that read removed units are refitted in closed form, without training and without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from fxprune.caller.arguments import CHECKS, chosen
from fxprune.caller.batches import Unpack, sample_count
from fxprune.caller.isolation import device_of, full_float32, kept_buffers, on_device, seeded
from fxprune.caller.meta import need_numbers
from fxprune.caller.ranks import give_from_first, in_all
from fxprune.caller.source_lines import warn
from fxprune.coupling.groups import Key
from fxprune.errors import CalibrationError, PlanError, stage
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.best_graph import BestGraph, OutputError
from fxprune.recovery.compensation.norm_statistics import re_estimate
from fxprune.recovery.compensation.ridge import fill, is_recurrent
from fxprune.recovery.compensation.sequential import refit
from fxprune.reporting.attach import note_compensation
from fxprune.reporting.history import created_biases
from fxprune.reporting.records import Compensation, Refit
from fxprune.reporting.report import Pruned
from fxprune.scoring.calibration import Calibration, calibration_of
from fxprune.scoring.divergence import Divergence, Metric, logits_of
from fxprune.scoring.moments import Moments
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import RECORD, ModelGraph, changed_buffers, example_of, flops_of
from fxprune.tracing.part import Run, part_of, with_part

Level = Literal["none", "bias", "ridge", "sequential"]
NOTHING = 1e-3  # of an output's variance, or nats: less is not worth a warning
LEVELS: tuple[str, ...] = get_args(Level)
ONE_IN = 8  # samples are set apart to judge by
ENOUGH = 512  # samples are enough to judge by
COMPARED = 1024  # samples are enough to compare plans by
LIGHT = 3e11  # flops of one pass over all samples; with more, nothing is repeated, and only one plan is made
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
    device: torch.device | str | None, max_samples: int | None = None, by_class: bool = False, final: bool = True,
    metric: Metric | None = None, new_biases: bool = True,
) -> nn.Module:  # fmt: skip
    """`small`, which a plan made of `model`, compensated, with an entry in its report.

    `by_class` says that the loss is the cross-entropy of the first output. A `final` model gets an error on samples
    that are set apart, see `judged`. One that is not final gets none; it is only to be compared with others. Without
    `new_biases`, layers that have no bias get none.
    """
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
            data, divergence = None, Divergence(metric=metric)
            if loader is not None:
                most = max_samples if final else min(max_samples or COMPARED, COMPARED)
                data = calibration_of(
                    model, graph, loader, submodule=plan.submodule, unpack=unpack, run=run, max_samples=most
                )
                if not plan.submodule and metric is None:
                    divergence = Divergence(logits_of(graph, data, by_class=by_class))
            options = Options(level, moments, divergence, int(seed), final, bool(new_biases))
            part, done = judged(planned, part, options, data)
        for name, value in state.items():
            part.get_buffer(name).copy_(value)
        record: Pruned = part.meta[RECORD]
        part.meta[RECORD] = replace(record, history=replace(record.history, biases=created_biases(graph, part)))
        small = with_part(small, plan.submodule, part.to(device_of(graph)))
        note_compensation(small, done, plan.submodule)
        loses = done.chosen is not None and done.chosen[0] > NOTHING
        if loses and final and level == "sequential" and not done.refitted and not done.norms:
            warn(
                f"compensate={level!r} changed nothing: no refit brought the outputs nearer to the original's on the "
                "samples held out, so the result is the plain removal; give more calibration samples"
            )
        return small


def is_light(graph: ModelGraph, samples: float) -> bool:
    """Whether a pass over so many samples is short enough to compensate several times."""
    return samples * sum(flops_of(graph).values()) / max(sample_count(example_of(graph)), 1) < LIGHT


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """How a graph is compensated: the level, the moments of the edges, the measure of the outputs, and the seed.

    `final` and `new_biases` are as for `with_compensation`.
    """

    level: str
    moments: Mapping[Key, Moments]
    divergence: Divergence
    seed: int
    final: bool = True
    new_biases: bool = True


def judged(
    planned: Planned, small: ModelGraph, options: Options, data: Calibration | None
) -> tuple[ModelGraph, Compensation]:
    """A copy of a narrowed graph, compensated, and how far its outputs are from the original's on fresh samples.

    A part of the samples is set apart for this. If the part is small, the compensation is repeated with other parts set
    apart, until enough samples have judged; the result is then fitted to all samples. Large models, for which this
    takes too long, are compensated once.
    """
    if data is None or not data.judges:
        return compensated(planned, small, options, None)
    count = int(data.summed(torch.tensor(sum(map(len, data.held)))))
    light = is_light(planned.graph, count) and data.ranks == 1
    times = -(-ENOUGH * ONE_IN // count) if light else 1
    if times > 1 and not options.final:
        return compensated(planned, small, options, data)
    pairs = [pair for pair in data.folds(planned.graph, ONE_IN)[:times] if pair[0].judges]
    if not in_all(bool(pairs)):
        return compensated(planned, small, options, data)
    if not options.final:
        return compensated(planned, small, options, pairs[0][0])
    total = np.zeros(3)
    for rest, apart in pairs:
        best, done = compensated(planned, small, options, rest)
        error = OutputError(planned.graph, apart, options.divergence)
        total += error.samples * np.array([error(small), error(best), 1])
    if times > 1:
        best, done = compensated(planned, small, options, data)
    before, after = (total[:2] / total[2]).tolist()
    return best, replace(done, before=before, after=after)


def compensated(
    planned: Planned, small: ModelGraph, options: Options, data: Calibration | None
) -> tuple[ModelGraph, Compensation]:
    """A copy of a narrowed graph, compensated; a step is kept only if its outputs are nearer to the original's.

    Without data, steps by the moments are kept untested, and nothing is fitted.
    """
    level = options.level
    error = None if data is None else OutputError(planned.graph, data, options.divergence)
    best = BestGraph(planned.graph, small, error)

    def fill_in(tried: ModelGraph, *, linear: bool) -> tuple[str, ...]:
        only = partial(is_recurrent, tried) if level == "sequential" else None
        return fill(planned, tried, options.moments, linear=linear, only=only, new_biases=options.new_biases)

    maps = (False,) if level == "bias" else (True, False)  # by the mean where a linear map does harm
    filled = next((done for linear in maps if (done := best.attempt(partial(fill_in, linear=linear)))), ())

    def fit(tried: ModelGraph, *, error: OutputError | None) -> tuple[Refit, ...]:
        how: Any = {"seed": options.seed, "all_rows": options.final, "new_biases": options.new_biases}
        return refit(planned, tried, data, error, **how) if data else ()

    layers, norms = None, None
    if data is not None and error is not None:
        if level == "sequential":
            ways = None, error  # all layers at once, or a few at a time where that is no gain
            fits = (best.attempt(partial(fit, error=way)) for way in ways)
            layers = next((found for found in fits if found), None)
        norms = best.attempt(lambda tried: re_estimate(tried, data))
        if data.ranks > 1:
            give_from_first(best.graph)
    chosen = None if best.before is None or best.error is None else (best.before, best.error)
    measure = (error or options).divergence.measure
    found = Compensation(level, None, None, layers or (), filled, norms or 0, measure, chosen)
    return best.graph, found
