"""One block of a decoder as a model of its own: its graph, its scores and curves, and its pruned and refitted copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arrays import Flags
from fxprune.caller.batches import sample_count
from fxprune.caller.isolation import full_float32, seeded, undisturbed
from fxprune.caller.ranks import in_all, rank_and_size
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.errors import stage
from fxprune.integrations.blockwise.stream import Stream
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.recovery.compensate import Options, compensated
from fxprune.reporting.records import Compensation
from fxprune.rewriting.class_limits import keep_to
from fxprune.rewriting.proof import error_of
from fxprune.rewriting.rewrite import rewrite
from fxprune.scoring.calibration import Calibration, Inputs
from fxprune.scoring.curves import measured_curves
from fxprune.scoring.divergence import Divergence
from fxprune.scoring.lockstep import live_bytes
from fxprune.scoring.score import score
from fxprune.scoring.scores import Scores
from fxprune.scoring.signals.table import activations, magnitudes
from fxprune.tracing.capture import capture, capture_as
from fxprune.tracing.graph import ClassLimits, ModelGraph, example_of
from fxprune.tracing.settings import settings_of

TINY = 1e-12
WORK, FLOPS = 1, 3e10  # forward passes over all samples that the curves of a block may take, or flops if that is more


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block of a decoder, by its `path` and `number`: its graph, and its coupling."""

    path: str
    number: int
    graph: ModelGraph
    coupling: Coupling


def block_of(
    path: str, number: int, module: nn.Module, stream: Stream, limits: ClassLimits, coupled: Mapping[str, Any]
) -> Block:
    """A block, captured on the first batch that enters it and compared with its module on the second, too.

    `limits` are those of the whole model, and `coupled` options of its coupling. Warnings are about the first block.
    """
    other = stream.inputs(number, 1) if len(stream.states) > 1 else None
    take = partial(capture_as, {"method": "auto"}) if number else capture
    graph = take(module, stream.inputs(number, 0), other=other)
    own = {name.removeprefix(f"{path}."): why for name, why in limits.held.items() if name.startswith(f"{path}.")}
    keep_to(graph, ClassLimits(own))
    with stage("coupling"), undisturbed():
        return Block(path, number, graph, analyse(graph, **coupled))


def states_of(output: Any) -> Tensor:
    """The hidden states in the output of a block."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def relative_error(wanted: Any, found: Any) -> float:
    """The squared error of hidden states, in shares of the square of the wanted ones at each position.

    The norm at the entrance of the next block divides each position by its size.

    >>> relative_error(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    0.5
    """
    goal, given = (states_of(values).double() for values in (wanted, found))
    return float(((given - goal).square().sum(-1) / goal.square().sum(-1).clamp_min(TINY)).mean())


def projected(seed: int, output: Any, numbers: Tensor) -> Tensor:
    """A random projection of the hidden states of samples, each position in shares of its size.

    Its squared derivative by a factor on a unit is, on average, the second-order change of `relative_error` by the
    unit's removal, in the approximation of Gauss and Newton.
    """
    states = states_of(output)
    generator = torch.Generator().manual_seed(seed + int(numbers[0]))
    signs = torch.randint(2, states.shape, generator=generator).to(states) * 2 - 1
    size = states.detach().square().sum(-1, keepdim=True).clamp_min(TINY).sqrt()
    return (states / size * signs).sum() / len(states)


def scored(block: Block, stream: Stream, *, coupled: Mapping[str, Any], seed: int, memory: int) -> Scores:
    """The scores of the units of a block by its own output, with curves and without moments."""
    graph, number = block.graph, block.number
    scores = score(graph, stream.share(number), partial(projected, seed), seed=seed, progress=False, **coupled)
    with stage("measuring curves"), seeded(seed), full_float32():
        data, sizes = calibration(block, stream, memory), magnitudes(graph, block.coupling)
        if not in_all(data.judges) or not block.coupling.units:
            return replace(scores, moments={})
        ranks = scores.propose, scores.protect, sizes, activations(block.coupling, scores.moments)
        curves = measured_curves(
            graph, block.coupling, scores.moments, scores.allocation("uniform"), ranks, data,
            Divergence(metric=relative_error), work=WORK, flops=FLOPS, memory=memory,
        )  # fmt: skip
    return replace(scores, curves=curves, magnitudes=sizes, moments={})


def calibration(block: Block, stream: Stream, memory: int, pruned: Stream | None = None) -> Calibration:
    """The inputs of a block, as many batches as two runs of its graph take at most `memory` bytes for.

    `pruned` holds the hidden states that the blocks before it give once they are pruned.
    """
    samples = max(sample_count(example_of(block.graph)), 1)
    room, most = memory * samples // max(2 * live_bytes(block.graph), 1), 0
    for batch, _ in stream.own:
        room -= len(stream.states[batch])
        most += most == 0 or room >= 0
    data = replace(Calibration.of(block.graph, _inputs(block, stream, most)), ranks=rank_and_size()[1])
    return data if pruned is None else replace(data, rewritten=_inputs(block, pruned, most))


def _inputs(block: Block, stream: Stream, most: int) -> list[Inputs]:
    """The values of the placeholders of a block's graph on the first batches."""
    nodes = [node for node in block.graph.graph.nodes if node.op == "placeholder"]
    given = [stream.inputs(block.number, batch) for batch, _ in stream.own[:most]]
    return [[each[str(n.target)] if str(n.target) in each else n.args[0] for n in nodes] for each in given]


def pruned(
    block: Block, keep: Flags, stream: Stream, other: Stream, *, level: str, seed: int, memory: int
) -> tuple[ModelGraph, float, Compensation]:
    """A block with the units `keep` alone, compensated; the error of its proof, and the compensation.

    `stream` enters the original, and `other` the pruned block: the refit makes up for the blocks before it, too.
    """
    planned = Planned(block.graph, block.coupling, keep)
    with stage("rewriting"), undisturbed():
        small = rewrite(*planned)
    error = error_of(Plan({}, {}, None, settings=settings_of(block.graph)), planned, small)
    with stage("compensating"), seeded(seed), full_float32():
        data = calibration(block, stream, memory, other)
        options = Options(level, {}, Divergence(metric=relative_error), seed, new_biases=False)
        small, done = compensated(planned, small, options, data if in_all(data.judges) else None)
    return small, error, done
