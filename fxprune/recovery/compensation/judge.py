"""The error of a rewritten graph against the original, on the samples that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.caller.example import opened
from fxprune.caller.isolation import evaluating
from fxprune.errors import blaming
from fxprune.recovery.compensation.calibration import Calibration, Inputs

TINY = 1e-12  # the least variance of an output


class Judge:
    """Holds the original's outputs on the samples held out, and compares others with them."""

    def __init__(self, graph: fx.GraphModule, data: Calibration) -> None:
        self.data, self.batches = data, data.judged(graph)
        self.goals = self._outputs(graph)

    def error(self, small: fx.GraphModule) -> float:
        """The mean squared error of the outputs of `small`, in shares of the variance of the original's.

        Outputs have equal weight; those that are no floating tensors, and numbers that are not finite, do not count.
        """
        errors = []
        for goal, found in zip(self.goals, self._outputs(small), strict=True):
            counts = goal.isfinite()
            wanted, apart = goal[counts], (found - goal)[counts]
            sums = self.data.summed(torch.stack([wanted.new_tensor(len(wanted)), wanted.sum(), apart.square().sum()]))
            number, total, square = (float(value) for value in sums)
            if number:
                spread = float(self.data.summed((wanted - total / number).square().sum()))
                errors.append((square / number) / max(spread / number, TINY))
        return sum(errors) / max(len(errors), 1)

    def _outputs(self, graph: fx.GraphModule) -> list[Tensor]:
        """Each of the graph's floating outputs, on all samples held out, in one row."""
        batches = []
        for index, (values, mask) in enumerate(self.batches):
            with blaming("the model", f"the samples held out, batch {index} of them"):
                batches.append([_held(output, mask) for output in _floating(graph, values)])
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _held(output: Tensor, mask: Tensor) -> Tensor:
    """The numbers of the samples held out; all of an output whose first axis is not that of the samples."""
    by_sample = output.ndim > 0 and len(output) == len(mask)
    return (output[mask.to(output.device)] if by_sample else output).double().reshape(-1)


def _floating(graph: fx.GraphModule, values: Inputs) -> Sequence[Tensor]:
    """The floating tensors among a graph's outputs in eval mode."""
    with torch.no_grad(), evaluating(graph):
        output: Any = graph(*pytree.tree_map_only(Tensor, torch.clone, list(values)))
    return [t for t in pytree.tree_leaves(opened(output)) if isinstance(t, Tensor) and t.is_floating_point()]
