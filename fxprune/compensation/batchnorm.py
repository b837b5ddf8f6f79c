"""BatchNorm statistics of a rewritten graph, taken anew on the calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.compensation.calibration import Inputs, fitting
from fxprune.isolation import evaluating


def norms_of(graph: fx.GraphModule) -> list[Any]:
    """The BatchNorms that keep running statistics and that the graph calls."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    modules = (graph.get_submodule(path) for path in sorted(called))
    return [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]


def re_estimate(graph: fx.GraphModule, inputs: Sequence[Inputs]) -> None:
    """Set the running statistics of every BatchNorm to those of the batches, without the samples held out."""
    norms = norms_of(graph)
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(graph):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        try:
            for values in fitting(inputs):
                graph(*values)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
