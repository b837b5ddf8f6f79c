"""The last stage but one: a rewritten model, compensated, in its place and with a note of it in its report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.caller.batches import Unpack
from fxprune.caller.isolation import device_of, kept_buffers, placed, precise, seeded
from fxprune.caller.meta import need_numbers
from fxprune.errors import CalibrationError, stage
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.recovery.compensation.calibration import calibration_of
from fxprune.recovery.compensation.levels import Level, check_level, compensated
from fxprune.reporting.attach import note_compensation
from fxprune.reporting.provenance import new_biases
from fxprune.reporting.report import Pruned
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import PRUNED, changed_buffers
from fxprune.tracing.part import Run, part_of, with_part


def repaired(
    model: nn.Module,
    plan: Plan,
    planned: Planned,
    small: nn.Module,
    scores: Scores | None,
    loader: Iterable[Any] | None,
    level: Level,
    *,
    unpack: Unpack | None,
    run: Run | None,
    seed: int,
    device: torch.device | str | None,
    max_samples: int | None = None,
) -> nn.Module:
    """`small`, which a plan made of `model`, `planned` by it, compensated, with a note of it in its report."""
    moments = scores.moments if scores else {}
    check_level(level, moments, loader)
    if level == "none":
        return small
    need_numbers(model, f"compensate={level!r}", CalibrationError)
    with stage("compensating"), seeded(seed), precise():
        graph, coupling, keep = planned
        part: Any = part_of(small, plan.submodule)
        state = {name: part.get_buffer(name).clone() for name in changed_buffers(graph)}
        with placed(device, graph, part), kept_buffers(graph):
            data = None
            if loader is not None:
                data = calibration_of(
                    model, graph, loader, submodule=plan.submodule, unpack=unpack, run=run, max_samples=max_samples
                )
            part, done = compensated(
                graph, part, coupling, keep, level=level, moments=moments, data=data, seed=int(seed)
            )
        for name, value in state.items():
            part.get_buffer(name).copy_(value)
        record: Pruned = part.meta[PRUNED]
        part.meta[PRUNED] = replace(record, history=replace(record.history, biases=new_biases(graph, part)))
        small = with_part(small, plan.submodule, part.to(device_of(graph)))
        note_compensation(small, done, plan.submodule)
        return small
