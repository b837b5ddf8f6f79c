"""Baselines for language models in the one-shot benchmark, as their papers have them.

Wanda-sp and FLAP (arXiv 2312.11983) and magnitude rank what fxprune finds prunable: hidden units, and groups of heads
that share keys and values. ShortGPT (arXiv 2403.03853) drops whole blocks, SliceGPT principal components.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from oneshot_models import Workload
from oneshot_search import AtBudget
from torch import Tensor, nn

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

    def noted(index: int, given: Tensor, found: Tensor) -> None:
        near[index] += float(torch.cosine_similarity(given, found, -1).mean())

    watched(work, blocks, noted)
    order = [int(index) for index in np.argsort(near)[::-1]]

    def at(budget: float) -> tuple[nn.Module, float]:
        small = copy.deepcopy(work.model)
        gone = order[: round((1 - budget) * len(blocks))]
        small.model.model.layers = nn.ModuleList(b for i, b in enumerate(small.model.model.layers) if i not in gone)
        small.model.config.num_hidden_layers = len(small.model.model.layers)
        return small, len(gone) / len(blocks)

    return at


def slice_gpt(work: Workload, *, shared: bool) -> AtBudget:
    """SliceGPT (arXiv 2401.15024): the last principal components of the residual stream are dropped, before each norm.

    Each layer has a rotation of its own, and residual connections a matrix between two; or all layers share one.
    """
    own = work.model.model.model
    points = [norm for layer in own.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    spreads = covariances(work, [*points, own.norm])
    turns = [spread.flip(1) for spread in torch.linalg.eigh(torch.stack(spreads)).eigenvectors]
    if shared:
        scaled = torch.stack([spread / spread.trace() for spread in spreads]).sum(0)
        turns = [torch.linalg.eigh(scaled).eigenvectors.flip(1)] * len(spreads)
    width = len(turns[0])

    @cache
    def at_width(kept: int) -> nn.Module:
        return sliced(work.model, [turn[:, :kept].float() for turn in turns], shared=shared)

    def at(budget: float) -> tuple[nn.Module, float]:
        limit = budget * work.size(work.model)
        kept = next(n for n in range(width, 0, -1) if work.size(at_width(n)) <= limit)
        return at_width(kept), kept / width

    return at


@torch.no_grad()
def covariances(work: Workload, norms: list[nn.Module]) -> list[Tensor]:
    """The second moments of the inputs of norms over the calibration, in float64."""
    found = [torch.zeros((), dtype=torch.float64) for _ in norms]

    def noted(index: int, given: Tensor, _: Tensor) -> None:
        rows = given.flatten(0, 1).double()
        found[index] = found[index] + rows.T @ rows

    watched(work, norms, noted)
    return found


def watched(work: Workload, modules: Sequence[nn.Module], note: Callable[[int, Tensor, Tensor], None]) -> None:
    """Call `note` with the number, the input and the output of each module, over the calibration."""
    handles = [
        module.register_forward_hook(lambda _, given, found, index=index: note(index, given[0], found))
        for index, module in enumerate(modules)
    ]
    for inputs, _ in work.calibration:
        work.model(inputs)
    for handle in handles:
        handle.remove()


class Turned(nn.Module):
    """A product with a matrix that is folded into the table of words, or into its transpose: no parameters."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows to rows."""
        return x @ self.matrix


class Block(nn.Module):
    """A layer of a LLaMA between two bases of the residual stream, with a third before its second half."""

    def __init__(self, layer: Any, turns: Sequence[Tensor], *, shared: bool) -> None:
        super().__init__()
        self.layer, (first, middle, last) = layer, turns
        between = (torch.empty(0), torch.empty(0)) if shared else (first.T @ middle, middle.T @ last)
        self.first, self.second = (nn.Parameter(matrix) for matrix in between)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Map the residual stream (n, t, width) to that behind the layer."""
        layer = self.layer
        held = x @ self.first if self.first.numel() else x
        x = held + layer.self_attn(hidden_states=layer.input_layernorm(x), **options)[0]
        held = x @ self.second if self.second.numel() else x
        found: Tensor = held + layer.mlp(layer.post_attention_layernorm(x))
        return found


@torch.no_grad()
def sliced(model: nn.Module, turns: Sequence[Tensor], *, shared: bool) -> nn.Module:
    """A copy whose residual stream is written in the bases `turns` (width, kept), one before each norm."""
    small: Any = copy.deepcopy(model)
    own, blocks = small.model.model, []
    for number, layer in enumerate(own.layers):
        first, middle, last = turns[2 * number : 2 * number + 3]
        attend, mlp = layer.self_attn, layer.mlp
        halves = (
            (layer.input_layernorm, (attend.q_proj, attend.k_proj, attend.v_proj), attend.o_proj, first, middle),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj, middle, last),
        )
        for norm, readers, writer, basis, onto in halves:
            for reader in readers:
                reader.weight = nn.Parameter(reader.weight * norm.weight @ basis)
            writer.weight = nn.Parameter(onto.T @ writer.weight)
            norm.weight = nn.Parameter(torch.full_like(basis[0], (basis.shape[0] / basis.shape[1]) ** 0.5))
        blocks.append(Block(layer, (first, middle, last), shared=shared))
    own.layers = nn.ModuleList(blocks)
    own.embed_tokens = nn.Sequential(own.embed_tokens, Turned(turns[0]))
    own.norm = nn.Sequential(Turned(turns[-1].T.contiguous()), own.norm)
    return small
