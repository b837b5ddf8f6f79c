"""Every operation in the table of rules, in a network made for it, under a strong plan and through verify."""

from __future__ import annotations

import copy

import pytest
from helpers import graph_of, part_of
from invariants import made, scored
from random_nets import FAMILIES, RandomNet, keys_of, one_of_each
from steps import KINDS
from torch import nn

import fxprune
from fxprune.rules.experts import expert_linear, sum_of_experts
from fxprune.rules.table import RULES, describe
from fxprune.tracing import symbolic

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated")
AT_ONCE = 16  # kinds in one network; one by one they take three times as long
ELSEWHERE = {"cuda", "tolist", expert_linear, sum_of_experts}  # need another device; test_experts has the others


def chunks() -> list[list[str]]:
    """The names of all kinds, some of one family at a time."""
    found = []
    for family in FAMILIES:
        names = [name for name, kind in KINDS.items() if kind.family == family]
        found += [names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)]
    return found


def prove(net: RandomNet, method: str = "auto") -> None:
    """Verify a network under a strong plan that removes what may go, and nothing else."""
    capture = fxprune.capture if method == "auto" else graph_of
    graph = capture(net, net.example(2), method=method)
    plan = fxprune.Scores.random(graph, net.example(2)).plan(alpha=1.0)
    assert fxprune.verify(graph, plan, made(graph, plan), net.example(3)) < 1e-9
    for step in net.steps:
        for source in step.sources:
            if source and net.steps[source - 1].kind == "conv":
                kept, of = len(plan.keep[f"layers.{source - 1}"]), plan.widths[f"layers.{source - 1}"]
                assert (kept == of) == KINDS[step.kind].whole, f"{step.kind} keeps {kept} of {of}"


def fails(name: str, method: str) -> str | None:
    """What is wrong with one kind, if it is tried alone."""
    try:
        prove(one_of_each([name]), method)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said with the kind's name
        return f"{name}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("names", "method"),
    [
        *part_of([(names, "auto") for names in chunks()], 2),
        *part_of([(names, "values") for names in chunks()], 8),
    ],
    ids=lambda part: part if isinstance(part, str) else f"{KINDS[part[0]].family}: {part[0]}",
)
def test_every_step_is_verified(names: list[str], method: str) -> None:
    try:
        prove(one_of_each(names), method)
    except Exception as error:
        raise AssertionError([found for n in names if (found := fails(n, method))] or "only together") from error


@pytest.mark.parametrize("names", part_of(chunks(), 9), ids=lambda names: f"{KINDS[names[0]].family}: {names[0]}")
def test_every_step_is_scored(names: list[str]) -> None:
    net = one_of_each(names)
    scores, single = scored(net), scored(copy.deepcopy(net).float())
    for found in (scores.propose, scores.protect, single.propose, single.protect):
        assert found.max() > 0
    graph = graph_of(net, net.example(2))
    plan = scores.plan(alpha=0.5)
    assert fxprune.verify(graph, plan, made(graph, plan), net.example(3)) < 1e-9


@pytest.mark.wide
def test_every_operation_of_the_table_is_in_a_step() -> None:
    """What is registered and in no step, and so never tried, is named: a step for it goes into `steps`."""
    missing = set(RULES) - set(symbolic._DROPOUTS) - ELSEWHERE
    for names in chunks():
        net = one_of_each(names)
        missing -= keys_of(fxprune.capture(net, net.example(), prove=False))
    assert not sorted(map(describe, missing))


def test_functional_dropouts_become_modules() -> None:
    """They follow the model's mode as modules; no graph has the functions, and their rules are those of the modules."""
    net = one_of_each(["F.dropout", "F.alpha_dropout", "torch.dropout by names"])
    keys = keys_of(fxprune.capture(net, net.example()))
    assert keys >= {nn.Dropout, nn.AlphaDropout}
    assert not keys & set(symbolic._DROPOUTS)
    assert all(RULES[function] is RULES[module] for function, module in symbolic._DROPOUTS.items())


def test_a_step_for_every_family_of_rules() -> None:
    modules = {str(getattr(function, "func", function).__module__) for function in RULES.values()}
    families = {name.rpartition(".")[2] for name in modules if name.startswith("fxprune.rules.")}
    assert families <= {*FAMILIES, "experts", "choices"}  # the latter are in tests/test_experts.py
