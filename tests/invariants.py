"""What holds of every network and every plan: a table of checks, each of one trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import difference, graph_of, outputs, parameters, rounding, squares, tensors_of
from numpy.typing import NDArray
from permuted import permuted
from random_nets import BATCHES, RandomNet
from torch import Tensor, fx, nn

import fxprune
from fxprune.caller.example import TensorSpec
from fxprune.planning.planned import planned_by
from fxprune.rewriting.oracle import oracle
from fxprune.rewriting.rewrite import rewrite
from fxprune.scoring.signals import reconstruction as elimination
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph

CLOSE = {torch.float64: 1e-7, torch.float32: 1e-3}  # of two scores, in shares of the largest: a tie


@dataclass(frozen=True)
class Trial:
    """A network, and the plan that a random ranking of its units gives at a level."""

    net: RandomNet
    seed: int
    alpha: float

    @cached_property
    def graph(self) -> ModelGraph:
        return graph_of(self.net, self.net.example())

    @cached_property
    def plan(self) -> fxprune.Plan:
        return fxprune.Scores.random(self.graph, self.net.example(), seed=self.seed).plan(alpha=self.alpha)

    @cached_property
    def small(self) -> nn.Module:
        return made(self.graph, self.plan)

    @cached_property
    def scores(self) -> fxprune.Scores:
        return scored(self.net)


def made(graph: ModelGraph, plan: fxprune.Plan) -> ModelGraph:
    """What ``fxprune.apply`` gives, without the report that comes with it."""
    return rewrite(*planned_by(graph, plan))


def scored(net: RandomNet) -> fxprune.Scores:
    """The scores of a network on two small batches, by the mean square of its outputs."""
    loader = [(net.example(batch), torch.arange(batch)) for batch in BATCHES]
    return fxprune.score(graph_of(net, net.example()), loader, squares, progress=False)


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
    same = made(fxprune.capture(trial.net, trial.net.example()), replace(trial.plan, keep=whole))
    error = difference(outputs(trial.net, trial.net.example()), outputs(same, trial.net.example()))
    assert error <= rounding(trial.net)
    before, after = trial.net.state_dict(), same.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return True


def two_ways_of_capture_agree(trial: Trial) -> bool:
    """The graphs of symbolic tracing and of tracing with values, and what the same plan makes of them."""
    example = trial.net.example(3)
    other = graph_of(trial.net, trial.net.example(), method="values")
    assert difference(outputs(trial.graph, example), outputs(other, example)) < 1e-9
    own = fxprune.Scores.random(other, trial.net.example(), seed=trial.seed).plan(alpha=trial.alpha)
    assert fxprune.verify(other, own, made(other, own), example) < 1e-9
    assert own.widths == trial.plan.widths
    plan = replace(trial.plan, settings={**trial.plan.settings, "method": "values"})
    assert difference(outputs(trial.small, example), outputs(made(other, plan), example)) < 1e-9
    return True


def permuted_channels_permute_the_plan(trial: Trial) -> bool:
    """Where no step minds the order of channels; plans are compared away from ties, of scores or of costs."""
    if not trial.net.alike:
        return False
    other, order = permuted(trial.net, trial.graph, trial.seed)
    assert difference(outputs(trial.net, trial.net.example()), outputs(other, trial.net.example())) < 1e-9
    one, two = trial.scores, scored(other)
    moved = replace(two, propose=two.propose[order], protect=two.protect[order])
    if apart(one, moved) > CLOSE[torch.float64] / 2 and nearest(trial.net) <= CLOSE[torch.float64]:
        return False  # of two units that cost the same, the one that stands first goes first
    if not agree(one, moved, trial.net):
        return False
    if any(tied(scores, torch.float64) for scores in (one.propose, one.protect)):
        return False
    assert np.array_equal(kept(one, trial.alpha), kept(two, trial.alpha)[order])
    return True


def scoring_twice_is_bit_equal(trial: Trial) -> bool:
    one, two = trial.scores, scored(trial.net)
    assert one.propose.tobytes() == two.propose.tobytes()
    assert one.protect.tobytes() == two.protect.tobytes()
    assert one.plan(trial.alpha) == two.plan(trial.alpha)
    return True


def precisions_agree_away_from_ties(trial: Trial) -> bool:
    """Also away from jumps, of a floor or an index, that rounding decides: where all values on the way agree.

    Which of two near values a maximum takes shows in the gradients alone.
    """
    trial = of_one_function(trial)
    net = copy.deepcopy(trial.net).float()
    graph = graph_of(net, net.example())
    seen = [(values(trial.graph, trial.net.example(size)), values(graph, net.example(size))) for size in BATCHES]
    if not all(agree_throughout(whole.there, rounded.there) for whole, rounded in seen):
        return False
    double, single = trial.scores, scored(net)
    if apart(single, double) > CLOSE[torch.float32] / 2 and any(
        jump(whole.back, rounded.back) for whole, rounded in seen
    ):
        return False
    if not agree(single, double, net):
        return False
    if any(tied(scores, torch.float32) for scores in (double.propose, double.protect)):
        return False
    assert double.plan(trial.alpha).keep == single.plan(trial.alpha).keep
    return True


def of_one_function(trial: Trial) -> Trial:
    """A trial of a network that computes the same in all precisions: what RMSNorms add to squares follows the dtype."""
    net = copy.deepcopy(trial.net)
    norms = [module for module in net.modules() if isinstance(module, nn.RMSNorm) and module.eps is None]
    for module in norms:
        module.eps = torch.finfo(torch.float32).eps
    return replace(trial, net=net) if norms else trial


@dataclass(frozen=True)
class Values:
    """All tensors on the way from the inputs of a graph to its outputs, and the gradients on the way back."""

    there: list[Tensor]
    back: list[Tensor]


class _Watched(fx.Interpreter):
    """Runs a graph and keeps the tensors of all its nodes, and later the gradients there."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.there: list[Tensor] = []
        self.back: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for tensor in tensors_of(result):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.back.__setitem__, len(self.there)))
            self.there.append(tensor.detach().clone())
        return result


def values(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Values:
    """What a graph computes on the way there and back."""
    run = _Watched(graph)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = squares(run.run(*inputs))
        if loss.requires_grad:
            torch.autograd.grad(loss, list(graph.parameters()), allow_unused=True)
    return Values(run.there, [run.back[number] for number in sorted(run.back)])


def agree_throughout(whole: list[Tensor], rounded: list[Tensor]) -> bool:
    """Whether two lists of tensors differ by rounding alone: none of an index, say."""
    pairs = [(_real(a), _real(b)) for a, b in zip(whole, rounded, strict=True) if a.numel()]
    return all(bool((a - b).abs().max() <= CLOSE[torch.float32] * a.abs().max()) for a, b in pairs)


def _real(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def jump(whole: list[Tensor], rounded: list[Tensor]) -> bool:
    """Whether gradients differ by more than rounding: it decides which of two near values a maximum takes."""
    largest = max((float(a.abs().max()) for a in whole if a.numel()), default=0.0)
    gaps = (float((_real(a) - _real(b)).abs().max()) for a, b in zip(whole, rounded, strict=True) if a.numel())
    return any(gap > CLOSE[torch.float32] * largest for gap in gaps)


def agree(one: fxprune.Scores, two: fxprune.Scores, net: RandomNet) -> bool:
    """Whether two scores are the same; they have to be, unless rounding alone moves that of `net` about as far."""
    found = apart(one, two)
    if found <= CLOSE[net.flat.weight.dtype] / 2:
        return True
    assert any(apart(one, scored(shaken(net, draw))) > found / 10 for draw in range(3))
    return False


def shaken(net: RandomNet, draw: int) -> RandomNet:
    """A network whose weights are changed by as little as rounding changes them."""
    other, generator = copy.deepcopy(net), torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.mul_(1 + 4 * torch.finfo(parameter.dtype).eps * noise)
    return other


def apart(one: fxprune.Scores, two: fxprune.Scores) -> float:
    """The largest difference of two scores of the same units, in shares of the largest score."""
    pairs = (one.propose, two.propose), (one.protect, two.protect)
    return max(float(np.abs(a - b).max(initial=0)) / max(float(np.abs(a).max(initial=0)), 1e-30) for a, b in pairs)


def nearest(net: RandomNet) -> float:
    """How near the two units that cost least ever came as a network's scores were made, in shares of the dearest."""
    gaps = [1.0]

    def watched(states: Sequence[elimination.State], count: int) -> NDArray[np.float64]:
        found = costs(states, count)
        left = np.sort(found[found > 0])  # those that went cost nothing
        gaps.extend((left[1:2] - left[:1]) / left[-1:])
        return found

    with pytest.MonkeyPatch.context() as patch:
        costs = elimination._costs
        patch.setattr(elimination, "_costs", watched)
        scored(net)
    return float(min(gaps))


def tied(scores: NDArray[np.float64], dtype: torch.dtype) -> bool:
    """Whether two scores are as near to each other as rounding may put them."""
    gaps = np.diff(np.sort(scores))
    return bool((gaps <= CLOSE[dtype] * np.abs(scores).max(initial=0)).any())


def kept(scores: fxprune.Scores, alpha: float) -> NDArray[np.bool_]:
    """Which units stay at a level."""
    return scores.allocation().keep(alpha)


INVARIANTS: dict[str, Callable[[Trial], bool]] = {  # each says whether there was something to compare
    "zeroing a unit equals deleting it": zeroing_equals_deleting,
    "shapes and literals agree": shapes_and_literals_agree,
    "the empty plan is the identity": the_empty_plan_is_the_identity,
    "two ways of capture agree": two_ways_of_capture_agree,
    "permuted channels permute the plan": permuted_channels_permute_the_plan,
    "scoring twice is bit-equal": scoring_twice_is_bit_equal,
    "precisions agree away from ties": precisions_agree_away_from_ties,
}
