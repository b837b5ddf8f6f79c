"""BatchNorm statistics of a rewritten graph, taken anew on the calibration batches."""

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
from fxprune.recovery.compensation.calibration import Calibration
from fxprune.recovery.compensation.lockstep import Stepper

SAMPLES = 256  # that statistics are taken anew from: with more, nothing was measurably better


def norms_of(graph: fx.GraphModule) -> dict[fx.Node, Any]:
    """The BatchNorms with running statistics of their own that the graph calls once, by the nodes that call them."""
    counts = uses(graph)
    calls = {n: graph.get_submodule(str(n.target)) for n in graph.graph.nodes if n.op == "call_module"}
    return {
        node: module
        for node, module in calls.items()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and counts[id(module.running_mean)] == 1
    }


def re_estimate(graph: fx.GraphModule, data: Calibration) -> int:
    """Set the running statistics of every BatchNorm to those of its inputs, without the samples held out.

    From the first to the last, so that each sees what those before it give with their new statistics. Returns how many.
    """
    norms = norms_of(graph)
    if not norms:
        return 0
    data = data.fitted(graph, math.ceil(SAMPLES / data.ranks))
    steps = Stepper(graph, data.inputs, data.numbers)
    with stage("re-estimating the BatchNorms"), torch.no_grad(), in_eval_mode(graph):
        for node in steps.nodes:
            if node in norms:
                (source,) = node.all_input_nodes
                parts = [_rest(x, data.mask(source.name, x, i, 1)) for i, x in enumerate(steps.to(source))]
                _set(norms[node], parts, data)
            steps.to(node)
            steps.passed(node)
    return len(norms)


def _rest(x: Tensor, held: Tensor) -> Tensor:
    """What a mask along one axis of a tensor leaves of it."""
    if not bool(held.any()):
        return x
    axis = max(range(held.ndim), key=lambda a: held.shape[a])
    return x.index_select(axis, (~held).flatten().nonzero().flatten())


def _set(norm: Any, parts: Sequence[Tensor], data: Calibration) -> None:
    """Set the running statistics of a BatchNorm to those of all parts (samples, channels, ...) together."""
    nothing = torch.zeros_like(norm.running_mean, dtype=torch.float64)
    found = [(0, nothing, nothing), *(_sums(part, norm.running_mean) for part in parts if part.numel())]
    count = int(data.summed(torch.tensor(sum(number for number, _, _ in found))))
    offset, square = (data.summed(torch.stack([sums[side] for sums in found]).sum(0)) for side in (1, 2))
    if count < 2:
        return
    norm.running_mean.copy_(norm.running_mean.double() + offset / count)
    norm.running_var.copy_((square / count - (offset / count).square()).clamp_min(0) * count / (count - 1))


def _sums(x: Tensor, center: Tensor) -> tuple[Any, ...]:
    """How many numbers each channel has, and the sums of their distances to a center, plain and squared.

    The old mean as center keeps the squares small, so single precision holds for what is summed within a sample.
    """
    apart = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    apart = apart.to(torch.promote_types(x.dtype, torch.float32)) - center[:, None]
    squares = torch.linalg.vector_norm(apart, dim=2).double().square()
    return apart.numel() // apart.shape[1], apart.sum(2).double().sum(0), squares.sum(0)
