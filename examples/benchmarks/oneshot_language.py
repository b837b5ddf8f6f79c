"""Baselines for language models in the one-shot benchmark, as their papers have them.

Wanda-sp and FLAP (arXiv 2312.11983) and magnitude rank what fxprune finds prunable: hidden units, and groups of heads
that share keys and values. ShortGPT (arXiv 2403.03853) drops whole blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oneshot_models import Workload
from oneshot_search import AtBudget
from torch import nn

import fxprune
from fxprune.coupling.readers import readers_on

Statistic = Callable[[Any], np.ndarray[Any, Any]]  # of the moments of an edge


def by_unit(evidence: fxprune.Evidence, statistic: Statistic, power: int) -> np.ndarray[Any, Any]:
    """Sums over a unit's columns: a statistic of the activations times the weights' absolute values to a power."""
    total = np.zeros(evidence.coupling.units + 1)
    for edge, moments in evidence.edges:
        for reader in readers_on(evidence.graph, edge):
            weights = reader.matrix().abs().pow(power).sum((1, 3)).flatten().cpu().numpy()
            np.add.at(total, edge.units, weights * statistic(moments))
    return total[:-1]


def wanda_sp(evidence: fxprune.Evidence) -> np.ndarray[Any, Any]:
    """The absolute weights times the norm of their inputs."""
    return by_unit(evidence, lambda found: np.sqrt(found.mean**2 + found.variance), 1)


def flap(evidence: fxprune.Evidence) -> np.ndarray[Any, Any]:
    """The variance of the inputs times the squared weights, standardised in each layer to be ranked over all."""
    found = by_unit(evidence, lambda moments: moments.variance, 2)
    for group in evidence.coupling.prunable:
        own = slice(group.units.start, group.units.stop)
        found[own] = (found[own] - found[own].mean()) / (found[own].std() + 1e-12)
    return found


def in_one_ranking(propose: Any, _protect: Any, _groups: Any) -> Any:
    """Levels by one ranking of all units."""
    return (np.argsort(np.argsort(propose)) + 0.5) / len(propose)


def ranked(signal: Any, allocate: Any, compensate: str) -> Callable[[Workload], AtBudget]:
    """Pruning by a signal and an allocation."""

    def prepare(work: Workload) -> AtBudget:
        scores = fxprune.score(work.model, work.calibration, propose=signal, **work.options)

        def at(budget: float) -> tuple[nn.Module, float | None]:
            plan = scores.plan(**work.budget(budget), allocate=allocate)
            return fxprune.apply(work.model, plan, scores=scores, compensate=compensate), plan.alpha

        return at

    return prepare


@torch.no_grad()
def short_gpt(work: Workload) -> AtBudget:
    """Blocks whose outputs are most like their inputs, by the mean cosine, are dropped; the nearest number of them."""
    blocks = list(work.model.model.model.layers)
    near = np.zeros(len(blocks))

    def noted(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, found: Any) -> None:
            near[index] += float(torch.cosine_similarity(given[0], found, -1).mean())

        return hook

    handles = [block.register_forward_hook(noted(index)) for index, block in enumerate(blocks)]
    for inputs, _ in work.calibration:
        work.model(inputs)
    for handle in handles:
        handle.remove()
    order = [int(index) for index in np.argsort(near)[::-1]]

    def at(budget: float) -> tuple[nn.Module, float]:
        small = copy.deepcopy(work.model)
        gone = order[: round((1 - budget) * len(blocks))]
        small.model.model.layers = nn.ModuleList(b for i, b in enumerate(small.model.model.layers) if i not in gone)
        small.model.config.num_hidden_layers = len(small.model.model.layers)
        return small, len(gone) / len(blocks)

    return at
