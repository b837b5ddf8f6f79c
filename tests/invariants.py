"""What holds of every network and every plan: a table of checks, each of one trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from helpers import difference, outputs, parameters, rounding, squares
from random_nets import BATCHES, RandomNet
from steps import KINDS
from torch import nn

import fxprune
from fxprune.caller.example import TensorSpec
from fxprune.planning.planned import planned_by
from fxprune.rewriting.oracle import oracle
from fxprune.rewriting.rewrite import rewrite
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph


@dataclass(frozen=True)
class Trial:
    """A network, and the plan that a random ranking of its units gives at a level.

    `exports` asks for torch.export, which takes longer than all else together, among the ways of capture.
    """

    net: RandomNet
    seed: int
    alpha: float
    exports: bool = True

    @cached_property
    def graph(self) -> ModelGraph:
        return fxprune.capture(self.net, self.net.example())

    @cached_property
    def plan(self) -> fxprune.Plan:
        return fxprune.Scores.random(self.graph, self.net.example(), seed=self.seed).plan(alpha=self.alpha)

    @cached_property
    def small(self) -> nn.Module:
        return made(self.graph, self.plan)

    @cached_property
    def scores(self) -> fxprune.Scores:
        return scored(self.net)

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways of capture beside the first."""
        exports = self.exports and all(KINDS[step.kind].exports for step in self.net.steps)
        return ("values", "export") if exports else ("values",)


def made(graph: ModelGraph, plan: fxprune.Plan) -> ModelGraph:
    """What ``fxprune.apply`` gives, without the report that comes with it."""
    return rewrite(*planned_by(graph, plan))


def scored(net: RandomNet) -> fxprune.Scores:
    """The scores of a network on two small batches, by the mean square of its outputs."""
    loader = [(net.example(batch), torch.arange(batch)) for batch in BATCHES]
    return fxprune.score(net, loader, squares, progress=False)


def zeroing_equals_deleting(trial: Trial) -> bool:
    assert fxprune.verify(trial.graph, trial.plan, trial.small, trial.net.example(3)) < 1e-9
    assert parameters(trial.small) <= parameters(trial.net)
    return True


def shapes_and_literals_agree(trial: Trial) -> bool:
    """Every value of the small graph has the shape of the original's, narrowed; the output's is as it was.

    At other batch sizes, too: there it is that of the zero-masked original.
    """
    masked = oracle(*planned_by(trial.graph, trial.plan))
    for batch in (1, 3, 5):
        example = trial.net.example(batch)
        assert [t.shape for t in outputs(trial.small, example)] == [t.shape for t in outputs(trial.net, example)]
        assert difference(outputs(masked, example), outputs(trial.small, example)) < 1e-9, batch
    before, after = (facts_on(graph, trial.net.example(4)).specs for graph in (trial.graph, trial.small))
    for name, spec in after.items():
        old = before.get(name)
        if isinstance(spec, TensorSpec) and isinstance(old, TensorSpec):
            assert len(spec.shape) == len(old.shape), name
            assert all(now <= was for now, was in zip(spec.shape, old.shape, strict=True)), name
    for path, module in trial.small.named_modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), path
        if isinstance(module, nn.Conv2d):
            shape = module.out_channels, module.in_channels // module.groups
            assert tuple(module.weight.shape[:2]) == shape, path
    return True


def the_empty_plan_is_the_identity(trial: Trial) -> bool:
    whole = {site: tuple(range(width)) for site, width in trial.plan.widths.items()}
    same = made(trial.graph, replace(trial.plan, keep=whole))
    error = difference(outputs(trial.net, trial.net.example()), outputs(same, trial.net.example()))
    assert error <= rounding(trial.net)
    before, after = trial.net.state_dict(), same.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return True


def two_ways_of_capture_agree(trial: Trial) -> bool:
    """The graphs of tracing and of torch.export, where it takes the model, and what the same plan makes of them.

    A layer that torch.export opens up, such as a cell that runs twice, has no site of its own there: another plan.
    """
    example = trial.net.example(3)
    for method in trial.ways:
        other = fxprune.capture(trial.net, trial.net.example(), method=method)
        assert difference(outputs(trial.graph, example), outputs(other, example)) < 1e-9
        own = fxprune.Scores.random(other, trial.net.example(), seed=trial.seed).plan(alpha=trial.alpha)
        assert fxprune.verify(other, own, made(other, own), example) < 1e-9
        if own.widths == trial.plan.widths:
            plan = replace(trial.plan, settings={**trial.plan.settings, "method": method})
            assert difference(outputs(trial.small, example), outputs(made(other, plan), example)) < 1e-9
    return True


def scoring_twice_is_bit_equal(trial: Trial) -> bool:
    one, two = trial.scores, scored(trial.net)
    assert one.propose.tobytes() == two.propose.tobytes()
    assert one.protect.tobytes() == two.protect.tobytes()
    assert one.plan(trial.alpha) == two.plan(trial.alpha)
    return True


INVARIANTS: dict[str, Callable[[Trial], bool]] = {  # each says whether there was something to compare
    "zeroing a unit equals deleting it": zeroing_equals_deleting,
    "shapes and literals agree": shapes_and_literals_agree,
    "the empty plan is the identity": the_empty_plan_is_the_identity,
    "two ways of capture agree": two_ways_of_capture_agree,
    "scoring twice is bit-equal": scoring_twice_is_bit_equal,
}
