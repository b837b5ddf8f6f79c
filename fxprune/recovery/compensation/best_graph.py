"""The best of several rewritten graphs, by the divergence of their outputs on samples that are held out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.caller.isolation import evaluating, in_eval_mode, ready_copies
from fxprune.errors import blaming
from fxprune.scoring.calibration import Calibration, Inputs
from fxprune.scoring.divergence import Divergence
from fxprune.tracing.finite import outputs
from fxprune.tracing.graph import ModelGraph

T = TypeVar("T")


class OutputError:
    """The divergence of a graph's outputs from those of an original, on the samples of its data that are held out."""

    def __init__(self, original: ModelGraph, data: Calibration, divergence: Divergence) -> None:
        self.data, self.batches = data, data.of_rewritten.judged(original)
        wanted = self.batches if data.rewritten is None else data.judged(original)
        self.goals = [_outputs(original, batch, index) for index, batch in enumerate(wanted)]
        self.divergence = divergence.scaled(self.goals, data.summed)

    @property
    def samples(self) -> int:
        """The number of samples of all ranks."""
        return int(self.data.summed(torch.tensor(sum(int(mask.sum()) for _, mask in self.batches))))

    def __call__(self, graph: fx.GraphModule) -> float:
        """The mean over the samples of all ranks."""
        total = torch.zeros(2, dtype=torch.float64)
        for index, (goal, (_, mask)) in enumerate(zip(self.goals, self.batches, strict=True)):
            samples = max(int(mask.sum()), 1)
            apart = self.divergence(goal, _outputs(graph, self.batches[index], index))
            total += torch.tensor([samples * apart, samples], dtype=torch.float64)
        value, count = self.data.summed(total).tolist()
        return float(value) / max(float(count), 1.0)


class BestGraph:
    """The best `graph` so far, with its `error`, and the error `before` any change; without a judge, the latest."""

    def __init__(self, original: ModelGraph, small: ModelGraph, judge: OutputError | None) -> None:
        self.original, self.graph, self.judge = original, small, judge
        self.before = self.error = None if judge is None else judge(small)

    def attempt(self, change: Callable[[ModelGraph], T]) -> T | None:
        """The result of a change of a copy of the graph, if the change was kept; otherwise None."""
        tried = copy.deepcopy(self.graph, ready_copies(self.graph))
        with torch.no_grad(), in_eval_mode(tried), evaluating(self.original):
            done = change(tried)
        if not done:
            return None
        if self.judge is not None and self.error is not None:
            error = self.judge(tried)
            if not error < self.error:
                return None
            self.error = error
        self.graph = tried
        return done


def _outputs(graph: fx.GraphModule, batch: tuple[Inputs, Tensor], index: int) -> Any:
    """The outputs of a graph for the samples of a batch that are held out."""
    values, mask = batch
    with blaming("the model", f"the samples held out, batch {index} of them"):
        return pytree.tree_map_only(Tensor, partial(_held, mask=mask), outputs(graph, values))


def _held(output: Tensor, mask: Tensor) -> Tensor:
    """The rows of the samples held out; all of an output whose first axis is not that of the samples."""
    by_sample = output.ndim > 0 and len(output) == len(mask)
    return output[mask.to(output.device)] if by_sample else output
