"""Networks whose graph is easily another network: what comes of each is exact, or an error that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import part_of
from hostile import HOSTILE, Hostile, judge
from hostile.matching import UnmatchedError, kept, masked
from torch import nn

import fxprune

ALLOWED = {"exact": ["exact"], "any": ["exact", "refused"], "said": ["exact", "refused", "said"]}
PLAIN = HOSTILE["hooks-hook_removed"]  # any that is exact and becomes smaller


@pytest.mark.parametrize("case", part_of(HOSTILE.values(), 12, HOSTILE))
def test_the_graph_is_the_model(case: Hostile) -> None:
    found = judge(case)
    assert found.verdict in ALLOWED[case.wanted], str(found)


def test_the_plain_one_is_exact_and_smaller() -> None:
    assert judge(PLAIN).verdict == "exact"
    assert judge(PLAIN).shrunk


def _spoiled(monkeypatch: pytest.MonkeyPatch, stage: str, spoil: Any) -> str:
    """What is found where a stage of the package hands over something else."""
    stage_itself = getattr(fxprune, stage)

    def spoiling(*args: Any, **kwargs: Any) -> nn.Module:
        given = stage_itself(*args, **kwargs)
        with torch.no_grad():
            spoil(given, args[0])
        return given

    monkeypatch.setattr(fxprune, stage, spoiling)
    return str(judge(PLAIN))


@pytest.mark.parametrize(
    ("stage", "spoil", "why"),
    [
        ("capture", lambda graph, model: graph.c1.bias.add_(0.1), "silent: off by"),
        ("capture", lambda graph, model: model.c1.bias.add_(0.1), "silent: capture changes the caller's model"),
        ("compress", lambda small, model: model.train(), "silent: compress changes the caller's model"),
        ("compress", lambda small, model: small.f.bias.add_(0.1), "silent: f.bias: what stays of"),
        ("compress", lambda small, model: small.c2.weight.add_(0.1), "silent: c2.weight: what stays of"),
        ("compress", lambda small, model: small.bn.running_mean.add_(1), "silent: the buffer bn.running_mean holds"),
        ("compress", lambda small, model: small.c1.weight.requires_grad_(False), "silent: no gradient: c1.weight"),
        ("compress", lambda small, model: 1 / 0, "foreign: ZeroDivisionError"),
    ],
)
def test_the_judge_sees(monkeypatch: pytest.MonkeyPatch, stage: str, spoil: Any, why: str) -> None:
    assert _spoiled(monkeypatch, stage, spoil).startswith(why)


def test_what_stays_is_found_by_its_values() -> None:
    full = torch.randn(5, 6, 3)
    found = kept(full, full[[4, 1]][:, [0, 2, 5]])
    assert found.axes == ((4, 1), (0, 2, 5), (0, 1, 2))
    assert torch.equal(
        masked(full, found, first=1) != 0, torch.tensor([1, 0, 1, 0, 0, 1])[:, None].bool().expand(5, 6, 3)
    )
    with pytest.raises(UnmatchedError, match=r"w: what stays of \(5, 6, 3\) has other values"):
        kept(full, full[:3] + 1e-3, "w")
