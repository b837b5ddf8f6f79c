"""BatchNorm statistics of a rewritten graph, taken anew on the calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.compensation.calibration import Calibration
from fxprune.compensation.lockstep import Stepper
from fxprune.isolation import evaluating
from fxprune.readers import uses


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
    steps = Stepper(graph, data.inputs)
    with torch.no_grad(), evaluating(graph):
        for node in steps.nodes:
            if node in norms:
                (source,) = node.all_input_nodes
                _set(norms[node], [_rows(x, ~data.mask(source.name, x, i, 1)) for i, x in enumerate(steps.to(source))])
            steps.to(node)
            steps.passed(node)
    return len(norms)


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    """The numbers (channels, n) of a tensor (samples, channels, ...) that a mask along one of its axes leaves."""
    axis = max(range(mask.ndim), key=lambda a: mask.shape[a])
    return x.index_select(axis, mask.flatten().nonzero().flatten()).movedim(1, 0).flatten(1)


def _set(norm: Any, parts: Sequence[Tensor]) -> None:
    """Set the running statistics of a BatchNorm to those of rows (channels, n)."""
    count = sum(part.shape[1] for part in parts)
    if count < 2:
        return
    mean = torch.stack([part.double().sum(1) for part in parts]).sum(0) / count
    squares = torch.stack([(part.double() - mean[:, None]).square().sum(1) for part in parts]).sum(0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(squares / (count - 1))
