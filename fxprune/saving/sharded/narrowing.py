"""From a plan and a model to the kept entries of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.caller.isolation import undisturbed
from fxprune.caller.tensors import aliases_of
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan
from fxprune.planning.planned import planned_by
from fxprune.rewriting.remaining import Checker
from fxprune.rewriting.rewrite import rewrite
from fxprune.rules.vocabulary import Slot
from fxprune.tracing.part import part_of

Kept = tuple[Tensor | None, ...]  # for each axis a mask of the kept indices; None where all are kept


@dataclass(frozen=True, slots=True, eq=False)
class Narrowing:
    """For every name in a model's state_dict its shape and kept entries; `aliases` maps further names to the first."""

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Kept]
    aliases: Mapping[str, str]


def narrowing_of(model: nn.Module, plan: Plan) -> Narrowing:
    """The entries that a plan keeps of each tensor of a model; the graph is rewritten, which shows that it runs.

    Raises PlanError where the plan does not fit, and RewriteError where the graph cannot be rewritten.
    """
    with undisturbed(), torch.no_grad():
        graph, coupling, keep = planned_by(model, plan)
        checker = Checker(graph, coupling, keep)
        small = rewrite(graph, coupling, keep).state_dict()
    part = part_of(model, plan.submodule).state_dict(keep_vars=True)
    by_id: dict[int, Kept] = {}
    for name, tensor in part.items():
        if isinstance(tensor, Tensor):
            by_id[id(tensor)] = _kept(checker, name, tensor)
            _check(name, tuple(tensor.shape), by_id[id(tensor)], small)
    whole = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    return Narrowing(
        {name: tuple(tensor.shape) for name, tensor in whole.items()},
        {name: by_id.get(id(tensor), (None,) * tensor.ndim) for name, tensor in whole.items()},
        aliases_of(whole),
    )


def shape_of(shape: tuple[int, ...], kept: Kept) -> tuple[int, ...]:
    """The shape of the kept entries of a tensor of some shape."""
    return tuple(size if mask is None else int(mask.sum()) for size, mask in zip(shape, kept, strict=True))


def _kept(checker: Checker, name: str, tensor: Tensor) -> Kept:
    owner = checker.owners.get(name)
    return tuple(checker.kept(Slot(owner, axis)) if owner else None for axis in range(tensor.ndim))


def _check(name: str, shape: tuple[int, ...], kept: Kept, small: Mapping[str, Tensor]) -> None:
    """Raise where the rewritten graph has another shape: its state_dict is no plain list of its tensors."""
    after, found = shape_of(shape, kept), tuple(small[name].shape) if name in small else None
    if found != after:
        raise CheckpointError(
            f"{name} is {after} by the plan and {found or 'missing'} in the rewritten model: its state_dict is not "
            "the plain list of its tensors; load the weights and use fxprune.apply"
        )
