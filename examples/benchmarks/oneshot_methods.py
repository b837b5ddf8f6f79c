"""The methods of the one-shot benchmark: fxprune in its configurations, and its peers, as one table.

A method prepares a model once (its scores, its gradients), and gives a function from a budget, a share of the MACs, to
a pruned copy. Where a method knows no budgets, its one number (a pruning ratio, a level) is found by bisection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import oneshot_language as language
import oneshot_peers as peers
from oneshot_models import CIFAR, DIGITS, MODELS, Workload
from oneshot_search import AtBudget
from torch import nn

import fxprune

WHOLE = "not pruned"
PROPOSE = ("separability", "magnitude", "activation", "taylor", "random")
PROTECT = ("taylor", "separability", "magnitude", "activation", "reconstruction", "random")
ALLOCATIONS = ("tod-by-group", "uniform", "global")
LEVELS = ("none", "bias", "ridge")
RESNETS = ("resnet20", "resnet56")
PEERS = tuple(name for name in MODELS if name not in ("speaker", "language"))
TRAINED = (*CIFAR, *DIGITS)
RESIDUAL = ("resnet20", "resnet56", "vit")


@dataclass(frozen=True, slots=True)
class Method:
    """How to prune a workload to budgets; the models that it is for; whether it is drawn, and whether it is bold."""

    prepare: Callable[[Workload], AtBudget]
    models: tuple[str, ...] = MODELS
    drawn: bool = False
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What fxprune's three stages are told beside their defaults."""

    score: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    apply: Mapping[str, Any] = field(default_factory=dict)


def ours(options: Options) -> Callable[[Workload], AtBudget]:
    """Scores once, then for every budget a plan and its network."""

    def prepare(work: Workload) -> AtBudget:
        scores = fxprune.score(work.model, work.calibration, **work.options, **options.score)

        def at(budget: float) -> tuple[nn.Module, float | None]:
            plan = scores.plan(**work.budget(budget), **options.plan)
            small = fxprune.apply(work.model, plan, scores=scores, loader=work.calibration, **options.apply)
            return small, plan.alpha

        return at

    return prepare


def compressed(work: Workload, **options: Any) -> AtBudget:
    """The call that users make."""
    return lambda budget: (
        fxprune.compress(work.model, work.calibration, **work.budget(budget), **work.options, **options), None
    )  # fmt: skip


DEFAULT = Options(apply={"compensate": "sequential"})
PUBLISHED = Options(score={"propose": "separability", "protect": "taylor"}, plan={"allocate": "tod-by-group"})
CONFIGURATIONS: dict[str, Options] = {
    "fxprune, allocate tod": DEFAULT,
    **{f"fxprune, compensate {level}": replace(DEFAULT, apply={"compensate": level}) for level in LEVELS},
    **{f"fxprune, allocate {way}": replace(DEFAULT, plan={"allocate": way}) for way in ALLOCATIONS},
    **{f"fxprune, propose {signal}": replace(DEFAULT, score={"propose": signal}) for signal in PROPOSE},
    **{f"fxprune, protect {signal}": replace(DEFAULT, score={"protect": signal}) for signal in PROTECT},
    "fxprune, propose magnitude, allocate uniform": replace(
        DEFAULT, score={"propose": "magnitude"}, plan={"allocate": "uniform"}
    ),
    "fxprune, propose taylor-by-sample, allocate global": replace(
        DEFAULT, score={"propose": "taylor-by-sample"}, plan={"allocate": "global"}
    ),
    "fxprune, as published": PUBLISHED,
}
ONE_SIGNAL = tuple(
    f"fxprune, {kind} {signal}" for kind, of in (("propose", PROPOSE), ("protect", PROTECT)) for signal in of
)
DRAWN = ("fxprune, allocate tod", "fxprune, compensate none", "fxprune, compensate ridge", "fxprune, as published")

METHODS: dict[str, Method] = {
    WHOLE: Method(lambda work: lambda budget: (copy.deepcopy(work.model), budget)),
    "fxprune": Method(compressed, drawn=True, bold=True),
    **{
        name: Method(ours(options), TRAINED if name in ONE_SIGNAL else MODELS, drawn=name in DRAWN)
        for name, options in CONFIGURATIONS.items()
    },
    **{
        f"refit of torch-pruning, {signal}{ranks}, stream kept": Method(
            peers.refitted(signal, scope=scope), (*CIFAR, "face"), drawn=True
        )
        for signal, scope, ranks in (("L2", "local", ""), ("Taylor", "global", ", global"))
    },
    "fxprune, allocate measured": Method(
        partial(compressed, allocate="measured"), ("resnet20", "speaker", "face", "language")
    ),
    "fxprune, equal blocks and no new biases": Method(
        partial(compressed, equal_blocks=True, new_biases=False), ("language",)
    ),
    "magnitude, uniform": Method(language.ranked("magnitude", "uniform", "none"), ("language",)),
    "Wanda-sp, uniform": Method(language.ranked(language.wanda_sp, "uniform", "none"), ("language",)),
    "FLAP": Method(language.ranked(language.flap, language.in_one_ranking, "bias"), ("language",)),
    "ShortGPT": Method(language.short_gpt, ("language",)),
    "torch-pruning, L2": Method(peers.torch_pruning("L2"), PEERS, drawn=True),
    "torch-pruning, L2, global": Method(peers.torch_pruning("L2", scope="global"), PEERS, drawn=True),
    "torch-pruning, L2, isomorphic": Method(peers.torch_pruning("L2", scope="isomorphic"), PEERS),
    "torch-pruning, L2, stream kept": Method(peers.torch_pruning("L2", stream=False), RESIDUAL, drawn=True),
    "torch-pruning, L2, global, stream kept": Method(
        peers.torch_pruning("L2", scope="global", stream=False), RESIDUAL, drawn=True
    ),
    "torch-pruning, BN scale": Method(peers.torch_pruning("BN scale"), CIFAR),
    "torch-pruning, BN scale, global": Method(peers.torch_pruning("BN scale", scope="global"), CIFAR),
    "torch-pruning, BN scale, stream kept": Method(peers.torch_pruning("BN scale", stream=False), RESNETS),
    "torch-pruning, BN scale, global, stream kept": Method(
        peers.torch_pruning("BN scale", scope="global", stream=False), RESNETS
    ),
    "torch-pruning, Taylor": Method(peers.torch_pruning("Taylor"), PEERS, drawn=True),
    "torch-pruning, Taylor, global": Method(peers.torch_pruning("Taylor", scope="global"), PEERS, drawn=True),
    "torch-pruning, Taylor, stream kept": Method(peers.torch_pruning("Taylor", stream=False), RESIDUAL, drawn=True),
    "torch-pruning, Taylor, global, stream kept": Method(
        peers.torch_pruning("Taylor", scope="global", stream=False), RESIDUAL, drawn=True
    ),
    "network-pruner": Method(peers.network_pruner, PEERS, drawn=True),
}
