"""Random small graphs under random plans: what holds of every network, a few hundred here and thousands if asked."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from invariants import INVARIANTS, Trial, agree_throughout, apart, jump, nearest, of_one_function, scored, values
from random_nets import RandomNet, Step, keys_of, nets
from torch import Tensor, nn
from zoo import conv, images, randomise

import fxprune
from fxprune.rules.table import describe

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated")
GRAPHS, FIRST = (int(os.environ.get(f"FXPRUNE_{name}", default)) for name, default in (("GRAPHS", 10_000), ("SEED", 0)))
EXAMPLES = {
    "zeroing a unit equals deleting it": 40,
    "shapes and literals agree": 25,
    "the empty plan is the identity": 15,
    "two ways of capture agree": 4,
    "permuted channels permute the plan": 12,
    "scoring twice is bit-equal": 10,
    "precisions agree away from ties": 12,
}


def trials(*, alike: bool = False) -> st.SearchStrategy[Trial]:
    levels = st.sampled_from([0.2, 0.5, 0.8, 1.0])
    return st.builds(Trial, nets(alike=alike), st.integers(0, 100), levels)


def test_every_invariant_is_tried() -> None:
    assert set(EXAMPLES) == set(INVARIANTS)


@pytest.mark.parametrize(("first", "ties"), [("attention", True), ("conv", False)])
def test_units_that_cost_the_same_are_told(first: str, *, ties: bool) -> None:
    """Of what the inner projection of an attention reads, the covariance alone counts: channels that never vary tie."""
    steps = [
        Step("conv", (0,), 8),
        Step(first, (0,), 4),
        Step("torch.all", (1,), 4),
        Step("nn.MultiheadAttention", (3,), 4),
    ]
    steps = steps if ties else steps[:2]
    assert (nearest(randomise(RandomNet(steps)).double().eval()) == 0) is ties


def test_precisions_are_compared_of_one_function() -> None:
    """An RMSNorm of one channel gives its sign, but for what it adds to the square."""
    steps = [Step("conv", (0,), 4), Step("conv", (1,), 1), Step("nn.RMSNorm", (2,), 4), Step("conv", (3,), 8)]
    trial = Trial(randomise(RandomNet(steps)).double().eval(), 0, 0.5)

    def between(trial: Trial) -> float:
        return apart(trial.scores, scored(copy.deepcopy(trial.net).float()))

    assert between(of_one_function(trial)) < 1e-4 < 1e-2 < between(trial)


class LargerOfTwo(nn.Module):
    """The larger of two values that differ by less than rounding in float32, of which one alone has a gradient."""

    def __init__(self, *, nearly: bool) -> None:
        super().__init__()
        self.a, self.more = conv(3, 8), 1e-10 if nearly else 1e-2

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() + 1
        return F.max_pool1d(torch.stack([x, x.detach() * (1 + self.more)], -1).flatten(1, 3), 2)


@pytest.mark.parametrize("nearly", [True, False])
def test_which_of_two_near_values_a_maximum_takes_shows_in_gradients(*, nearly: bool) -> None:
    model, x = randomise(LargerOfTwo(nearly=nearly)).double(), images()(2).double()
    whole = values(fxprune.capture(model, x), (x,))
    rounded = values(fxprune.capture(model.float(), x.float()), (x.float(),))
    assert agree_throughout(whole.there, rounded.there)
    assert jump(whole.back, rounded.back) is nearly


@pytest.mark.parametrize("share", [0.3, pytest.param(1.0, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds_for_random_graphs(name: str, share: float) -> None:
    compared = 0

    @settings(max_examples=math.ceil(share * EXAMPLES[name]))
    @given(trial=trials(alike="permute" in name))
    def check(trial: Trial) -> None:
        nonlocal compared
        compared += INVARIANTS[name](trial)

    check()
    assert compared


@pytest.mark.many
def test_all_of_it_holds_for_many_random_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """FXPRUNE_GRAPHS of them, from FXPRUNE_SEED on: another seed, other graphs."""
    seen: Counter[str] = Counter()

    def say(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{text}\n")

    @seed(FIRST)
    @settings(max_examples=GRAPHS, derandomize=False, database=None, suppress_health_check=list(HealthCheck))
    @given(trial=st.booleans().flatmap(lambda alike: trials(alike=alike)))
    def check(trial: Trial) -> None:
        seen.update(["graphs", *map(describe, keys_of(trial.graph))])
        seen.update(name for name, holds in INVARIANTS.items() if holds(trial))
        if seen["graphs"] % 100 == 0:
            say(f"{seen['graphs']} graphs")

    check()
    say(summary(seen))
    assert seen["graphs"] >= GRAPHS


def summary(seen: Counter[str]) -> str:
    """How many graphs there were, on how many each invariant was compared, and how many held each operation."""
    found = [(name, count) for name, count in seen.most_common() if name not in ("graphs", *INVARIANTS)]
    lines = [f"{seen['graphs']} graphs; there was something to compare in so many of them:"]
    lines += [f"{seen[name]:8} {name}" for name in INVARIANTS]
    lines += [f"with {len(found)} operations, each in so many of them:"]
    return "\n".join(lines + [f"{count:8} {name}" for name, count in found])
