"""The axis of the samples in the tensors of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec, is_dense
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph, example_of

_TOO_SMALL = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True, slots=True)
class SampleAxis:
    """The axis `index` of a tensor holds the samples of a batch, each in `times` consecutive places."""

    index: int = 0
    times: int = 1

    def first(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        """The tensor with the samples along axis 0, and the new place of its axis `dim`."""
        if self.index == dim:
            return x, dim
        moved, dim = x.movedim(self.index, 0), dim + int(dim < self.index)
        if self.times == 1:
            return moved, dim
        return moved.reshape(-1, self.times, *moved.shape[1:]), dim + 1


def sample_axes(graph: ModelGraph) -> dict[str, SampleAxis | None]:
    """The axis of the samples in the value of every node, by its shapes on one sample and on two.

    None for values that do not depend on the number of samples. Nodes whose shapes do not show the axis are left out,
    and all nodes if the model does not run on one sample.
    """
    one, two = (pytree.tree_map_only(Tensor, partial(_samples, count=n), example_of(graph)) for n in (1, 2))
    try:
        specs, others = (facts_on(graph, example).specs for example in (one, two))
    except _TOO_SMALL:  # of the model's operations, such as a norm of one number
        return {}
    found: dict[str, SampleAxis | None] = {}
    for name, spec in specs.items():
        other = others[name]
        if type(spec) is TensorSpec and type(other) is TensorSpec and len(spec.shape) == len(other.shape):
            changed = [axis for axis, (a, b) in enumerate(zip(spec.shape, other.shape, strict=True)) if a != b]
            if len(changed) <= 1 and 0 not in spec.shape:
                found[name] = SampleAxis(changed[0], spec.shape[changed[0]]) if changed else None
    return found


def _samples(x: Tensor, *, count: int) -> Tensor:
    """The first `count` rows of a tensor, repeated where it has fewer."""
    return x[torch.arange(count, device=x.device) % len(x)] if is_dense(x) and x.ndim and len(x) else x
