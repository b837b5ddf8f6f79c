"""Attention: whole heads or places in every head, statistics on request, and the module that can be looked into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, double, graph_of, outputs, parameters, part_of
from torch import Tensor, nn
from zoo import ZOO, randomise, tensors
from zoo.attention import Block, E, H, Multihead, T

import fxprune
from fxprune.tracing.attention import MultiheadAttention, lower

NORMED = [
    name for name in ZOO
    if name.startswith(("attention_", "shared_keys", "multihead_"))
    or name in ("relative_bias", "rotated_heads", "gated_units", "layer_norm", "group_norm", "local_response_norm",
                "mean_over_channels", "softmax_over_channels", "normalised_over_channels", "tied_words")
]  # fmt: skip
HEADED = [name for name in NORMED if name.startswith(("attention_", "shared_keys", "multihead_", "relative"))]


@pytest.mark.parametrize("name", part_of(NORMED, 3))
def test_inexact_groups_equal_the_original_with_statistics_over_what_stays(name: str) -> None:
    case = ZOO[name]
    example = double(case.example(2))
    model = graph_of(case.build().double(), example)
    exact = fxprune.apply(model, fxprune.Scores.random(model, example).plan(1.0))
    for seed, alpha in enumerate((0.3, 0.6, 1.0)):
        plan = fxprune.Scores.random(model, example, seed=seed, inexact=True).plan(alpha)
        small = fxprune.apply(model, plan)
        assert fxprune.verify(model, plan, small, double(case.example(3))) < 1e-9
    assert parameters(small) < parameters(exact)


@pytest.mark.parametrize("name", part_of(HEADED, 3))
def test_the_same_places_of_every_head_can_go(name: str) -> None:
    case = ZOO[name]
    example = double(case.example(2))
    model = graph_of(case.build().double(), example)
    for seed, alpha in enumerate((0.3, 0.6, 1.0)):
        plan = fxprune.Scores.random(model, example, seed=seed, head_dim=True).plan(alpha)
        small = fxprune.apply(model, plan)
        assert fxprune.verify(model, plan, small, double(case.example(3))) < 1e-9
    assert parameters(small) < parameters(model)


def test_a_plan_remembers_how_grids_and_statistics_were_taken(tmp_path: Any) -> None:
    case = ZOO["multihead_plain"]
    model, example = case.build(), case.example(2)
    plan = fxprune.Scores.random(model, example, inexact=True, head_dim=True).plan(0.6)
    plan.save(tmp_path / "plan.json")
    again = fxprune.Plan.load(tmp_path / "plan.json")
    small = fxprune.apply(case.build(), again)
    assert small.embed.out_features < E
    assert small.attention.inner.out_proj.in_features % H == 0
    assert fxprune.verify(model, again, small, example) < 1e-4
    report = fxprune.report(small)
    assert report.captured == "fx"
    assert {g.inexact for g in report.groups if "embed" in g.sites} == {
        "LayerNorm norm takes a statistic over the channels"
    }
    assert "inexact: LayerNorm norm" in str(report)


def test_inexact_groups_say_so() -> None:
    case = ZOO["multihead_plain"]
    graph = fxprune.capture(case.build(), case.example(2))
    (whole,) = (group for group in fxprune.couple(graph) if "embed" in str(group))
    assert whole.frozen == "LayerNorm norm takes a statistic over the channels"
    (group,) = (group for group in fxprune.couple(graph, inexact=True) if "embed" in str(group))
    assert group.frozen is None
    assert group.inexact == "LayerNorm norm takes a statistic over the channels"
    assert "prunable, inexactly: LayerNorm norm" in str(group)


def _scores(model: nn.Module, loader: Any, **options: Any) -> fxprune.Scores:
    return fxprune.score(model, loader, progress=False, **options)


def test_the_r_score_of_a_head_is_the_slope_of_the_loss_along_its_output() -> None:
    model = ZOO["multihead_plain"].build().double().eval()
    loader = [(tensors(T, 6)(6).double(), torch.arange(6) % 5)]
    scores = _scores(model, loader, protect="taylor")
    site = next(s for s in scores.sites if s.name == "attention.inner.in_proj_weight")
    out = model.attention.inner

    def loss_with(head: int, factor: float) -> float:
        small = lower(nn.ModuleList([out]))[0]
        scale = torch.ones(E, dtype=torch.float64)
        scale[head * E // H : (head + 1) * E // H] = factor
        handle = small.out_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale,))
        model.attention.inner = small
        x, y = loader[0]
        value = float(F.cross_entropy(model(x), y).detach() * len(x))
        handle.remove()
        model.attention.inner = out
        return value

    for head in range(H):
        unit = site.units[head * E // H]
        slope = (loss_with(head, 1 + 1e-5) - loss_with(head, 1 - 1e-5)) / 2e-5
        assert scores.protect[unit] == pytest.approx(abs(slope), rel=1e-6)


def test_samples_are_found_where_time_comes_first_and_in_windows() -> None:
    class TimeFirst(nn.Module):
        def __init__(self, inner: Block, windows: int) -> None:
            super().__init__()
            self.inner, self.windows = inner, windows

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner.embed(x)
            z = self.inner.norm(y)
            if self.windows:  # two tokens make a window
                z = z.reshape(-1, self.windows, E)
                y = y + self.inner.attention.inner(z, z, z, need_weights=False)[0].reshape(y.shape)
            else:
                z = z.transpose(0, 1)
                y = y + self.inner.attention.inner(z, z, z, need_weights=False)[0].transpose(0, 1)
            y = y.transpose(0, 1).contiguous() + self.inner.mlp(self.inner.second(y.transpose(0, 1)))
            return self.inner.head(y.mean(0))

    torch.manual_seed(0)
    block = randomise(Block(Multihead())).eval()
    loader = [(tensors(6, 6)(7), torch.arange(7) % 3), (tensors(6, 6)(4), torch.arange(4) % 3)]
    first = _scores(TimeFirst(block, 0), loader)
    block.attention.inner.batch_first = True
    batch = _scores(block, loader)
    assert first.protect == pytest.approx(batch.protect, rel=1e-4, abs=1e-7)
    order = {site.name.removeprefix("inner."): site.units for site in first.sites}
    for site in batch.sites:
        assert (order[site.name] == site.units).all()
    hidden = next(site.units for site in batch.sites if site.name == "mlp.0")
    heads = next(site.units for site in batch.sites if site.name == "attention.inner.in_proj_weight")
    for units in (hidden, heads):
        assert first.propose[units] == pytest.approx(batch.propose[units], rel=1e-3)
    windows = _scores(TimeFirst(block, 2), loader)
    assert windows.about["samples"] == 11
    assert (windows.propose[heads] > 0).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "time first": {"batch_first": False},
    "no bias": {"bias": False},
    "other widths": {"kdim": 10, "vdim": 12},
    "learned keys": {"add_bias_kv": True},
    "zero keys": {"add_zero_attn": True, "add_bias_kv": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "each head", "padding", "both"])
@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_lowered_attention_gives_what_the_original_gives(name: str, masks: str, batched: bool) -> None:
    options = {"batch_first": True} | OPTIONS[name]
    torch.manual_seed(0)
    original = randomise(nn.MultiheadAttention(E, H, **options)).eval()
    lowered = lower(nn.ModuleList([original]))[0]
    assert isinstance(lowered, MultiheadAttention)
    query, key, value = torch.randn(2, T, E), torch.randn(2, 7, options.get("kdim", E)), torch.randn(2, 7, E)
    value = torch.randn(2, 7, options.get("vdim", E))
    blocked = torch.rand(T, 7) > 0.7
    attn_mask = {"bool": blocked, "both": blocked, "float": torch.randn(T, 7)}.get(masks)
    if masks == "each head":
        attn_mask = torch.randn(2 * H if batched else H, T, 7)
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 7]) if masks in ("padding", "both") else None
    inputs = [query, key, value]
    if not batched:
        inputs, padding = [x[0] for x in inputs], None if padding is None else padding[0]
    elif not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        wanted = original(*inputs, key_padding_mask=padding, attn_mask=attn_mask, **weights)
        found = lowered(*inputs, key_padding_mask=padding, attn_mask=attn_mask, **weights)
        assert (wanted[1] is None) == (found[1] is None)
        pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if a is not None]
        assert difference([a for a, _ in pairs], [b for _, b in pairs]) < 1e-5


def test_lowered_attention_keeps_its_names_and_counts_its_heads() -> None:
    case = ZOO["multihead_plain"]
    model, example = case.build(), case.example(2)
    small = fxprune.apply(model, fxprune.Scores.random(model, example, seed=1).plan(1.0))
    inner = small.attention.inner
    assert list(small.state_dict()) == list(model.state_dict())
    assert inner.num_heads < H
    assert inner.num_heads == inner.in_proj_weight.shape[0] // 3 // inner.head_dim
    x = torch.randn(2, T, E)
    assert inner(x, x, x, need_weights=False)[0].shape == x.shape
    assert outputs(small, example)[0].shape == (2, 5)
