"""Random small graphs under random plans: what holds of every network, a few hundred here and thousands if asked."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from invariants import INVARIANTS, Trial
from random_nets import keys_of, nets

from fxprune.rules.table import describe

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated")
GRAPHS, FIRST = (int(os.environ.get(f"FXPRUNE_{name}", default)) for name, default in (("GRAPHS", 10_000), ("SEED", 0)))
EXPORTED = "captured by torch.export, too"
EXAMPLES = {
    "zeroing a unit equals deleting it": 100,
    "shapes and literals agree": 40,
    "the empty plan is the identity": 30,
    "two ways of capture agree": 4,
    "scoring twice is bit-equal": 20,
}
ALWAYS, RARELY = st.just(value=True), st.sampled_from([True] + [False] * 9)


def trials(*, alike: bool = False, exports: st.SearchStrategy[bool] = ALWAYS) -> st.SearchStrategy[Trial]:
    levels = st.sampled_from([0.2, 0.5, 0.8, 1.0])
    return st.builds(Trial, nets(alike=alike), st.integers(0, 100), levels, exports)


def test_every_invariant_is_tried() -> None:
    assert set(EXAMPLES) == set(INVARIANTS)


@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds_for_random_graphs(name: str) -> None:
    compared = 0

    @settings(max_examples=EXAMPLES[name])
    @given(trial=trials())
    def check(trial: Trial) -> None:
        nonlocal compared
        compared += INVARIANTS[name](trial)

    check()
    assert compared


@pytest.mark.many
def test_all_of_it_holds_for_many_random_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """FXPRUNE_GRAPHS of them, from FXPRUNE_SEED on: another seed, other graphs; torch.export takes one in ten."""
    seen: Counter[str] = Counter()

    def say(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{text}\n")

    @seed(FIRST)
    @settings(max_examples=GRAPHS, derandomize=False, database=None, suppress_health_check=list(HealthCheck))
    @given(trial=st.booleans().flatmap(lambda alike: trials(alike=alike, exports=RARELY)))
    def check(trial: Trial) -> None:
        seen.update(["graphs", *[EXPORTED] * ("export" in trial.ways), *map(describe, keys_of(trial.graph))])
        seen.update(name for name, holds in INVARIANTS.items() if holds(trial))
        if seen["graphs"] % 100 == 0:
            say(f"{seen['graphs']} graphs")

    check()
    say(summary(seen))
    assert seen["graphs"] >= GRAPHS


def summary(seen: Counter[str]) -> str:
    """How many graphs there were, on how many each invariant was compared, and how many held each operation."""
    told = [*INVARIANTS, EXPORTED]
    found = [(name, count) for name, count in seen.most_common() if name not in ("graphs", *told)]
    lines = [f"{seen['graphs']} graphs; there was something to compare in so many of them:"]
    lines += [f"{seen[name]:8} {name}" for name in told]
    lines += [f"with {len(found)} operations, each in so many of them:"]
    return "\n".join(lines + [f"{count:8} {name}" for name, count in found])
