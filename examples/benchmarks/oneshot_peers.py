"""The peers of the one-shot benchmark, called as their documentation has it.

torch-pruning (arXiv 2301.12900): its group importances, the output layer ignored, one step, at a pruning ratio. By
default a group spans the whole residual stream; `stream=False` ignores the layers that write to it, too. Gradients for
its Taylor importance come from one pass over all calibration batches, in eval mode.

network-pruner: the tolerance of difference as published (arXiv 2508.02291), at a ToD level. It scores in train mode,
which moves the statistics of BatchNorm; so it scores a copy, and its result takes weights from the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from oneshot_models import SmallViT, Workload
from oneshot_search import AtBudget, at_budgets
from original import quietly_elsewhere
from torch import nn

import fxprune

SAMPLES = 32  # of each class, for network-pruner's distances, as by default


def torch_pruning(signal: str, *, scope: str = "local", stream: bool = True) -> Callable[[Workload], AtBudget]:
    """torch-pruning by a signal (L2, BN scale, Taylor), ranked in a scope (local, global, isomorphic)."""

    def prepare(work: Workload) -> AtBudget:
        model = copy.deepcopy(work.model)
        if signal == "Taylor":
            for inputs, labels in work.calibration:
                ((work.loss or F.cross_entropy)(model(inputs), labels) / len(work.calibration)).backward()
        kept = () if stream else work.stream
        return at_budgets(lambda ratio: _pruned(model, work, signal, scope, kept, ratio), work)

    return prepare


def refitted(signal: str, *, scope: str) -> Callable[[Workload], AtBudget]:
    """torch-pruning's choice of channels, with fxprune's compensation of what is left."""

    def prepare(work: Workload) -> AtBudget:
        theirs = torch_pruning(signal, scope=scope, stream=False)(work)

        def at(budget: float) -> tuple[nn.Module, float | None]:
            small, level = theirs(budget)
            plan = fxprune.Plan.from_kept(work.model, work.example, small.kept)
            return fxprune.apply(work.model, plan, loader=work.calibration, compensate="sequential"), level

        return at

    return prepare


def _pruned(
    model: nn.Module, work: Workload, signal: str, scope: str, kept: tuple[str, ...], ratio: float
) -> nn.Module:
    """A copy of the model, with its gradients, after one step of torch-pruning at a pruning ratio.

    Its attribute `kept` holds the output channels that are left of each layer that lost some.
    """
    import torch_pruning as tp

    importances: dict[str, Callable[[], Any]] = {
        "L2": tp.importance.GroupMagnitudeImportance,
        "BN scale": tp.importance.BNScaleImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
    }
    small = copy.deepcopy(model)
    for mine, theirs in zip(small.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad  # a deep copy leaves gradients behind
    layers = dict(small.named_modules())
    outputs = [layers[name] for name in ("conv4_1", "conv4_2") if name in layers] or [
        [layer for layer in layers.values() if isinstance(layer, nn.Linear)][-1]
    ]
    ignored = [*outputs, *(layers[name] for name in kept)]
    pruner = tp.pruner.BasePruner(
        small, work.example, importance=importances[signal](), pruning_ratio=ratio, ignored_layers=ignored,
        global_pruning=scope != "local", isomorphic=scope == "isomorphic", **_attention(small),
        in_channel_groups={}, out_channel_groups={},  # its defaults are shared by all calls, and filled
    )  # fmt: skip
    names, left = {layer: name for name, layer in layers.items()}, dict[str, list[int]]()
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            layer, name = dependency.target.module, names.get(dependency.target.module)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and dependency.handler.__name__ == "prune_out_channels":
                own = left.get(name, list(range(layer.weight.shape[0])))
                left[name] = [channel for place, channel in enumerate(own) if place not in set(indices)]
        group.prune()
    small.zero_grad()
    small.kept = left
    return small.eval()


def _attention(model: nn.Module) -> dict[str, Any]:
    """What torch-pruning has to be told about a transformer: its heads, and its bare parameter."""
    if not isinstance(model, SmallViT):
        return {"num_heads": {}}
    heads = {layer: block.heads for block in model.layers for layer in (block.query, block.key, block.value)}
    return {"num_heads": heads, "unwrapped_parameters": [(model.position, 2)]}


def network_pruner(work: Workload) -> AtBudget:
    """network-pruner: metrics once, then ratios, skeleton and weights at every ToD level."""
    from Network_Pruner import FAIR_Pruner as fp

    def shrunk(level: float) -> nn.Module:
        with quietly_elsewhere():
            return built(fp.get_ratios(work.model, metrics, ToD_level=level))

    def built(ratios: list[int]) -> nn.Module:
        skeleton = fp.get_skeleton(copy.deepcopy(work.model), ratios, work.example)
        options = {"example_inputs": work.example, "device": torch.device("cpu")}
        return fp.prune(skeleton, copy.deepcopy(work.model), metrics, ratios, **options)[0]

    with quietly_elsewhere():
        layers = [m for m in work.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.LSTM))][:-1]
        # Scores take minutes; where it cannot rebuild the model with nothing removed, they would be for nothing.
        fp.get_skeleton(copy.deepcopy(work.model), [0] * len(layers), work.example)
        inputs, labels = (torch.cat(parts) for parts in zip(*work.calibration, strict=True))
        metrics = fp.get_metrics(
            copy.deepcopy(work.model), cifar.loader_of(inputs, labels), device=torch.device("cpu"),
            the_samplesize_for_compute_distance=SAMPLES,
        )  # fmt: skip
    return at_budgets(shrunk, work)
