"""The calibration batches as a captured graph takes them, and how far a rewritten graph is from the original on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.batches import Unpack, batches, fitted, sample_count, to_device
from fxprune.capture import ModelGraph, example_of, placeholder_values
from fxprune.compensation.lockstep import live_bytes
from fxprune.example import opened
from fxprune.isolation import device_of, evaluating
from fxprune.objective import Part
from fxprune.submodule import Run, call_whole, name_of, with_part

MEMORY = 2 << 30  # bytes for the values of the calibration batches
EVERY = 5  # the last of so many samples is held out
Inputs = Sequence[Any]  # of one batch: the values of a graph's placeholders


def inputs_of(
    model: nn.Module,
    graph: ModelGraph,
    loader: Iterable[Any],
    *,
    submodule: str = "",
    unpack: Unpack | None = None,
    run: Run | None = None,
    memory: int = MEMORY,
) -> list[Inputs]:
    """What the graph, a capture of the part of `model` at `submodule`, is given for the batches of a loader.

    As many batches, one at least, as the values of two graphs take no more than `memory` bytes for.
    """
    device = device_of(graph)
    a_sample = live_bytes(graph) / max(sample_count(example_of(graph)), 1)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    part = Part(graph, graph, name_of(model, submodule))
    whole = with_part(model, submodule, part) if submodule or run else part
    found: list[Inputs] = []
    samples = 0
    with torch.no_grad(), evaluating(whole):
        for inputs, targets in batches(loader, unpack):
            inputs, targets = to_device((inputs, targets), device)
            if whole is part:
                values = placeholder_values(graph, fitted(inputs, names))
            else:
                part.seen = None
                call_whole(whole, inputs, targets, run=run)
                values = part.seen or []
            samples += length(values)
            if found and 2 * a_sample * samples > memory:
                break
            found += [values] if values else []
    return found


def length(values: Inputs) -> int:
    """The number of samples of a batch."""
    return next((len(x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.ndim), 1)


def held_out(samples: int, before: int = 0) -> Tensor:
    """Which of so many samples, that follow `before` others, are held out."""
    return (before + torch.arange(samples)) % EVERY == EVERY - 1


def fitting(inputs: Sequence[Inputs]) -> list[Inputs]:
    """The batches without the samples that are held out."""
    found: list[Inputs] = []
    seen = 0
    for values in inputs:
        samples = length(values)
        mask = ~held_out(samples, seen)
        found.append(
            pytree.tree_map_only(
                Tensor, lambda t, m=mask: t[m.to(t.device)] if t.ndim and len(t) == len(m) else t, list(values)
            )
        )
        seen += samples
    return found


def distance(graph: fx.GraphModule, small: fx.GraphModule, inputs: Sequence[Inputs]) -> float:
    """The mean squared error of what `small` gives on the samples held out, in shares of the original's variance.

    The outputs' floating tensors count alike; of those whose first axis is not that of the samples, all samples do.
    """
    wanted, found = ([_outputs(g, values) for values in inputs] for g in (graph, small))
    errors = []
    for index in range(len(wanted[0])):
        goal, given = ([] for _ in range(2))
        seen = 0
        for a, b, values in zip(wanted, found, inputs, strict=True):
            samples = length(values)
            mask = held_out(samples, seen).to(a[index].device)
            by_sample = a[index].ndim > 0 and len(a[index]) == samples
            goal.append((a[index][mask] if by_sample else a[index]).double().reshape(-1))
            given.append((b[index][mask] if by_sample else b[index]).double().reshape(-1))
            seen += samples
        goal, given = torch.cat(goal), torch.cat(given)
        if goal.numel():
            errors.append(float((goal - given).square().mean() / goal.var(unbiased=False).clamp_min(1e-12)))
    return sum(errors) / max(len(errors), 1)


def _outputs(graph: fx.GraphModule, values: Inputs) -> list[Tensor]:
    """The floating tensors of what a graph gives in eval mode."""
    with torch.no_grad(), evaluating(graph):
        output = graph(*pytree.tree_map_only(Tensor, torch.clone, list(values)))
    return [t for t in pytree.tree_leaves(opened(output)) if isinstance(t, Tensor) and t.is_floating_point()]
