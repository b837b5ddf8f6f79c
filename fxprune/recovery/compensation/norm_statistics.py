"""BatchNorm statistics of a rewritten graph, recomputed on the calibration batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.caller.isolation import in_eval_mode
from fxprune.coupling.readers import uses
from fxprune.errors import stage
from fxprune.recovery.compensation.aims import called
from fxprune.scoring.calibration import Calibration
from fxprune.scoring.lockstep import Stepper

SAMPLES = 256  # that statistics are recomputed from: with more, nothing was measurably better


def norms_of(graph: fx.GraphModule) -> dict[fx.Node, Any]:
    """The BatchNorms with running statistics of their own that the graph calls once, by the nodes that call them."""
    counts = uses(graph)
    calls = ((node, called(graph, node)) for node in graph.graph.nodes)
    norms = ((node, module) for node, module in calls if isinstance(module, _BatchNorm))
    return {node: norm for node, norm in norms if norm.running_mean is not None and counts[id(norm.running_mean)] == 1}


def re_estimate(graph: fx.GraphModule, data: Calibration) -> int:
    """Set the running statistics of every BatchNorm to those of its inputs, without the samples held out.

    From the first to the last, so that each sees its inputs after the others before it changed. Returns their number.
    """
    norms = norms_of(graph)
    if not norms:
        return 0
    data = data.of_rewritten.fitted(graph, math.ceil(SAMPLES / data.ranks))
    steps = Stepper(graph, data.inputs, data.numbers)
    with stage("re-estimating the BatchNorms"), torch.no_grad(), in_eval_mode(graph):
        for node in steps.nodes:
            if node in norms:
                (source,) = node.all_input_nodes
                parts = [_unmasked(x, data.mask(source.name, x, i, 1)) for i, x in enumerate(steps.to(source))]
                _set(norms[node], parts, data)
            steps.passed(node)
    return len(norms)


def _unmasked(x: Tensor, held: Tensor) -> Tensor:
    """The parts of a tensor that a mask along one axis does not mark."""
    if not bool(held.any()):
        return x
    axis = max(range(held.ndim), key=lambda a: held.shape[a])
    return x.index_select(axis, (~held).flatten().nonzero().flatten())


def _set(norm: Any, parts: Sequence[Tensor], data: Calibration) -> None:
    """Set the running statistics of a BatchNorm to those of all parts (samples, channels, ...) together.

    Sums are taken about the old mean: squares are small then, and single precision suffices within a sample.
    """
    center = norm.running_mean
    count, sums = 0, [torch.zeros(2, len(center), dtype=torch.float64, device=center.device)]
    for x in parts:
        if x.numel():
            apart = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
            apart = apart.to(torch.promote_types(x.dtype, torch.float32)) - center[:, None]
            squares = torch.linalg.vector_norm(apart, dim=2).double().square()
            count += apart.numel() // apart.shape[1]
            sums.append(torch.stack([apart.sum(2).double().sum(0), squares.sum(0)]))
    count, total = int(data.summed(torch.tensor(count))), data.summed(torch.stack(sums).sum(0))
    if count > 1:
        offset, square = total / count
        center.copy_(center.double() + offset)
        norm.running_var.copy_((square - offset.square()).clamp_min(0) * count / (count - 1))
