"""The best of several rewritten graphs, by their errors against the original on the samples that are held out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, fx

from fxprune.caller.isolation import evaluating, in_eval_mode
from fxprune.errors import blaming
from fxprune.scoring.calibration import Calibration
from fxprune.tracing.finite import floating_outputs
from fxprune.tracing.graph import ModelGraph

TINY = 1e-12  # the least variance of an output
T = TypeVar("T")


class BestGraph:
    """The best `graph` so far, with its `error`, and the error `before` any change; without data, the latest."""

    def __init__(self, original: ModelGraph, small: ModelGraph, data: Calibration | None) -> None:
        self.original, self.graph, self.data = original, small, data
        self.before = self.error = None
        if data is not None:
            self.batches = data.judged(original)
            self.goals = self._outputs(original)
            self.before = self.error = self._error(small, data)

    def attempt(self, change: Callable[[ModelGraph], T]) -> T | None:
        """The result of a change of a copy of the graph, if the change was kept; otherwise None."""
        tried = copy.deepcopy(self.graph)
        with torch.no_grad(), in_eval_mode(tried), evaluating(self.original):
            done = change(tried)
        if not done:
            return None
        if self.data is not None and self.error is not None:
            error = self._error(tried, self.data)
            if not error < self.error:
                return None
            self.error = error
        self.graph = tried
        return done

    def _error(self, small: fx.GraphModule, data: Calibration) -> float:
        """The mean squared error of the outputs of `small`, in shares of the variance of the original's.

        Outputs have equal weight; those that are no floating tensors, and numbers that are not finite, do not count.
        """
        errors = []
        for goal, found in zip(self.goals, self._outputs(small), strict=True):
            counts = goal.isfinite()
            wanted, apart = goal[counts], (found - goal)[counts]
            sums = data.summed(torch.stack([wanted.new_tensor(len(wanted)), wanted.sum(), apart.square().sum()]))
            number, total, square = (float(value) for value in sums)
            if number:
                spread = float(data.summed((wanted - total / number).square().sum()))
                errors.append((square / number) / max(spread / number, TINY))
        return sum(errors) / max(len(errors), 1)

    def _outputs(self, graph: fx.GraphModule) -> list[Tensor]:
        """Each of the graph's floating outputs, on all samples held out, in one row."""
        batches = []
        for index, (values, mask) in enumerate(self.batches):
            with blaming("the model", f"the samples held out, batch {index} of them"):
                batches.append([_held(output, mask) for output in floating_outputs(graph, values)])
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _held(output: Tensor, mask: Tensor) -> Tensor:
    """The numbers of the samples held out; all of an output whose first axis is not that of the samples."""
    by_sample = output.ndim > 0 and len(output) == len(mask)
    return (output[mask.to(output.device)] if by_sample else output).double().reshape(-1)
