"""Blocks that repeat keep equal numbers of units of each kind, and multiples are given by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.coupling.kinds import place_in_block
from fxprune.errors import PlanError
from fxprune.planning.allocation import ALLOCATIONS, MEASURED, Allocation, jointly, levels
from fxprune.planning.curves import Curves, bundles, measured_levels
from fxprune.scoring.scores import Scores

HEADS, PLACES, WIDTH, HIDDEN = 4, 4, 16, 24


class Block(nn.Module):
    """Attention, and an MLP behind it; both are added to the stream."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (p(y).view(*y.shape[:2], -1, PLACES).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A stem, blocks of one class, and one that is wider."""

    def __init__(self, blocks: int = 3, last: int = HIDDEN) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([*(Block() for _ in range(blocks - 1)), Block(last)])
        self.first, self.second = nn.Linear(WIDTH, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.second(F.relu(self.first(x.mean(1))))))


def loader(batch: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, 5, 6, generator=generator), torch.arange(batch) % 3) for _ in range(2)]


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


@pytest.fixture(scope="module")
def scores() -> Scores:
    model = net()
    return fxprune.score(model, loader(), progress=False, equal_blocks=True).with_curves(model, loader())


def kept(plan: fxprune.Plan, layer: str) -> list[int]:
    return [len(found) for site, found in plan.keep.items() if site.startswith("blocks.") and site.endswith(layer)]


def test_kinds_and_repeats(scores: Scores) -> None:
    names = [name for name, _, _ in scores.groups]
    assert dict(zip(names, scores.kinds, strict=True)) == {
        **{f"blocks.{i}.{name}": kind for i in range(3) for name, kind in (("q", "heads"), ("up", "hidden"))},
        "first": "hidden", "second": "hidden",
    }  # fmt: skip
    found = {tuple(names[number] for number in numbers) for numbers in scores.repeats}
    assert found == {tuple(f"blocks.{i}.{name}" for i in range(3)) for name in ("q", "up")}
    columns = fxprune.couple(fxprune.capture(net(), loader()[0][0], prove=False), head_dim=True)
    assert [group.kind for group in columns if group.frozen is None][:2] == ["head_dim", "head_dim"]


def test_a_block_of_another_width_is_no_repeat() -> None:
    scores = Scores.random(net(last=20), loader()[0][0])
    names = [name for name, _, _ in scores.groups]
    found = {tuple(names[number] for number in numbers) for numbers in scores.repeats}
    assert found == {tuple(f"blocks.{i}.q" for i in range(3)), ("blocks.0.up", "blocks.1.up")}


def test_blocks_are_modules_of_one_class_beside_each_other() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    modules = dict(
        nn.ModuleList([nn.ModuleDict({"a1": block, "b1": block}), block, nn.Linear(2, 2)]).named_modules(
            remove_duplicate=False
        )
    )
    assert place_in_block("0.a1.0", modules) == place_in_block("0.a7.0", {**modules, "0.a7": block})
    assert place_in_block("0.a1.0", modules) != place_in_block("0.b1.0", modules)
    assert place_in_block("1.0", modules) != place_in_block("0.a1.0", modules)
    assert place_in_block("2", modules) == "2"  # a layer is no block


@pytest.mark.wide
def test_kinds_of_experts() -> None:
    graph = fxprune.capture(experts.family("deepseek_v3"), experts.words(), prove=False)
    found: dict[str, set[str]] = {}
    for group in fxprune.couple(graph):
        if group.frozen is None:
            found.setdefault(group.kind, set()).update(s.name.split("model.layers.1.")[-1] for s in group.sites)
    assert found["experts"] == {"mlp.gate"}
    assert found["expert_units"] == {"mlp.experts.gate_up_proj"}
    assert "mlp.shared_experts.up_proj" in found["hidden"]


@pytest.mark.parametrize("allocate", [*ALLOCATIONS, MEASURED])
@pytest.mark.parametrize("share", [0.85, 0.6])
def test_equal_numbers_under_a_budget(scores: Scores, allocate: str, share: float) -> None:
    plan = scores.plan(params=share, allocate=allocate)
    assert plan.budget is not None
    assert share - 0.05 < plan.budget.achieved <= share
    for layer in ("q", "up"):
        assert len(set(kept(plan, layer))) == 1
    assert len({plan.keep[f"blocks.{i}.up"] for i in range(3)}) > 1 or kept(plan, "up")[0] == HIDDEN  # its own best
    free = Scores(**{name: getattr(scores, name) for name in Scores.__dataclass_fields__} | {"curves": None})
    if allocate == "tod":
        widths = {tuple(kept(free.plan(params=s, allocate="tod", equal_blocks=False), "up")) for s in (0.8, 0.7, 0.6)}
        assert any(len(set(each)) > 1 for each in widths)


def test_multiples_by_kind(scores: Scores) -> None:
    plan = scores.plan(params=0.6, allocate="global", round_to={"heads": 2, "hidden": 8})
    assert {number // PLACES % 2 for number in kept(plan, "q")} == {0}
    assert {number % 8 for number in kept(plan, "up")} == {0}
    assert len(plan.keep["first"]) in (8, 12)
    eight = scores.plan(params=0.75, allocate="global", round_to=8)
    assert set(kept(eight, "q")) == {WIDTH}  # no multiple of eight heads is less than four
    assert kept(scores.plan(params=0.5, allocate="global", round_to={"hidden": 8}), "q")[0] < WIDTH


def test_the_curves_are_of_equal_blocks(scores: Scores) -> None:
    assert scores.curves is not None
    assert len(scores.curves.starts) - 1 == 4  # heads, hidden units, and two layers alone
    depths, _ = scores.curves.of(0)
    assert not (depths % 3).any()
    with pytest.raises(PlanError, match=r"measured with equal_blocks=True, and the plan .* with equal_blocks=False"):
        scores.plan(params=0.7, allocate=MEASURED, equal_blocks=False)


def test_steps_that_save_nothing_alone_are_taken_together() -> None:
    """Two groups of four that keep equal numbers: the cost falls once both have lost a unit."""
    groups = [("a", 0, 4), ("b", 4, 8), ("c", 8, 12)]
    equal = ((np.arange(4), np.arange(4, 8)),)
    allocation = Allocation(np.zeros(12), np.arange(12.0), groups, equal=equal)
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11])
    curves = Curves(np.array([0, 1, 2]), np.array([6, 3]), np.array([0.06, 0.3]), order)
    level = measured_levels(curves, bundles(allocation), lambda keep: float(allocation.settled(keep).sum()))
    assert level[[0, 4, 1, 5, 2, 6]].max() < level[[8, 9, 10]].min()


@given(st.integers(0, 10_000), st.sampled_from(sorted(ALLOCATIONS)), st.integers(1, 3), st.floats(0, 1))
def test_levels_are_joint(seed: int, allocate: str, multiple: int, alpha: float) -> None:
    drawn = np.random.default_rng(seed).random((2, 18))
    groups = [("a", 0, 6), ("b", 6, 12), ("c", 12, 18)]
    level = jointly(levels(allocate, drawn[0], drawn[1], groups), drawn[0], groups, [(0, 1)])
    assert np.array_equal(np.sort(level[:6]), np.sort(level[6:12]))
    keep = Allocation(level, drawn[0], groups, round_to={"hidden": multiple}).keep(alpha)
    assert keep[:6].sum() == keep[6:12].sum()
    assert keep[:6].sum() % multiple == 0


def test_compress_with_equal_blocks(tmp_path: Path) -> None:
    how: Any = {"equal_blocks": True, "round_to": {"hidden": 2}, "progress": False}
    small = fxprune.compress(net(blocks=2), loader(8), params=0.7, **how)
    report = fxprune.report(small)
    assert {group.after for group in report.groups if group.name.endswith(".q")} in ({2}, {3}, {4})
    assert len({group.after for group in report.groups if group.name.endswith(".up")}) == 1
    assert report.error < 1e-5
    assert "equal_blocks=True" in report.provenance.call
    scores = fxprune.score(net(blocks=2), loader(8), round_to={"hidden": 2}, equal_blocks=True, progress=False)
    scores.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert again.plan(params=0.7) == scores.plan(params=0.7)
    assert again.round_to == {"hidden": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"head": 2}, r"round_to: there is no kind of units 'head'; close names: 'heads'.*: heads, head_dim, hidden"),
        ({"heads": 0}, "round_to: 'heads' has 0; it is a whole number"),
        (True, "round_to is True; it is a whole number"),
    ],
)
def test_multiples_that_are_none(scores: Scores, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        scores.plan(params=0.7, round_to=value)
