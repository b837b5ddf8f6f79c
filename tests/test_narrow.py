"""Models narrowed in their own class: equal to what `apply` gives, or refused with the line that stands against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectors import BATCHES as DETECTED
from detectors import OPTIONS, Detector, detector
from helpers import difference, outputs, part_of, picture, rounding, same_picture, storages, width
from nets import layers
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18
from zoo import ZOO, images

import fxprune
from fxprune.errors import NarrowError, PlanError

BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5)]
REFUSED = (
    "attention_", "shared_keys_", "multihead_", "cross_attention", "relative_bias", "talking_heads", "rotated_heads",
    "single_head", "channel_attention", "group_norms", "correlation", "attention_inside", "transformer_layer",
    "constants_of_channels", "channel_shuffle", "shuffle_units", "maxout", "selective_kernel", "write_",
    "loop_over_chunks", "branch_on_shape", "assert_on_shape", "keywords_and_defaults", "assigns_in_places",
    "shape_and_literal", "flatten_spellings", "vector_to_map", "split_spellings", "channel_slices", "permutation",
    "flip_and_roll", "roll_then_add", "expansion", "zero_padded_channels", "sizes_of_channels", "sizes_in_arithmetic",
    "lstm_cell_from_zeros", "lstm_cell_from_new", "lstm_from_zeros", "directions_summed", "recurrent_inside", "ghost",
    "shared_group", "involution", "experts_in_groups", "message_passing", "conv_lstm", "conv_gru", "own_gru",
    "selective_scan", "sums",
)  # fmt: skip


def planned(model: nn.Module, example: Any, alpha: float = 0.5, **options: Any) -> fxprune.Plan:
    return fxprune.Scores.random(model, example, **options).plan(alpha=alpha, allocate="tod-by-group")


@pytest.mark.parametrize("name", part_of([name for name in ZOO if not name.startswith(REFUSED)][::2], 5))
def test_the_class_is_kept_and_the_outputs_are_those_of_apply(name: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    plan, before = planned(model, case.example(2)), picture(model)
    own, small = fxprune.narrow(model, plan), fxprune.apply(model, plan)
    assert same_picture(before, picture(model))
    assert [type(m) for m in own.modules()] == [type(m) for m in model.modules()]
    assert not storages(own) & storages(model)
    inputs = case.example(3 if case.any_batch else 2)
    assert difference(outputs(small, inputs), outputs(own, inputs)) <= 1e-6 + rounding(model)
    state = small.state_dict()
    assert {key: t.shape for key, t in own.state_dict().items()} == {key: t.shape for key, t in state.items()}


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith(REFUSED)][::5])
def test_a_forward_that_names_sizes_is_refused_and_apply_is_named(name: str) -> None:
    model = ZOO[name].build().eval()
    plan = planned(model, ZOO[name].example(2), alpha=1.0)
    with pytest.raises(NarrowError, match=r"use fxprune\.apply, whose graph mends that"):
        fxprune.narrow(model, plan)


@layers(lambda: dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Linear(8 * 64, 5)))
def Literal(self, x: Tensor) -> Tensor:
    """Its forward names the number of channels, in one line."""
    x = self.a(x).relu()
    return self.b(x.view(-1, 8 * 64))


def test_the_message_has_the_node_and_the_line() -> None:
    model = Literal()
    with pytest.raises(
        NarrowError, match=r"at view, which apply mends \(.*test_narrow.py\", line \d+, in Literal return"
    ):
        fxprune.narrow(model, planned(model, images()(2)))


def test_attention_that_loses_heads_is_named() -> None:
    model = ZOO["multihead_plain"].build()
    plan = planned(model, ZOO["multihead_plain"].example(2))
    with pytest.raises(
        NarrowError, match=r"attention.inner is an nn.MultiheadAttention of 4 heads, some of which are removed"
    ):
        fxprune.narrow(model, plan)


def test_attention_that_keeps_its_heads_is_no_matter() -> None:
    model = nn.TransformerEncoderLayer(12, 4, 24, batch_first=True).eval()
    example = torch.randn(2, 3, 12)
    plan = planned(model, example, exclude=["self_attn"])
    own = fxprune.narrow(model, plan)
    assert type(own) is nn.TransformerEncoderLayer
    assert own.linear1.out_features < 24
    assert difference(outputs(fxprune.apply(model, plan), example), outputs(own, example)) < 1e-5


def test_a_number_that_follows_from_the_width_is_found_out() -> None:
    """No label shows it, and nothing fails: only the outputs differ."""

    @layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(8, 5)))
    def Scaled(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x / x.shape[-1])

    model = Scaled()
    with pytest.raises(
        NarrowError, match=r"its outputs differ from those of apply by .* of their scale, more than 0\.0001"
    ):
        fxprune.narrow(model, planned(model, torch.randn(2, 6)))


@pytest.mark.parametrize("build", part_of([resnet18, mobilenet_v2], 2))
def test_models_of_torchvision(build: Any) -> None:
    model = build(num_classes=10).eval()
    inputs = images(size=64)(2)
    plan = planned(model, inputs)
    own = fxprune.narrow(model, plan)
    assert type(own) is type(model)
    assert difference(outputs(fxprune.apply(model, plan), inputs), outputs(own, inputs)) < 1e-6


def test_a_part_is_narrowed_in_the_whole() -> None:
    model = detector().eval()
    small = fxprune.compress(model, DETECTED, 0.3, **OPTIONS)
    plan = small.backbone.meta["fxprune"].plan
    own = fxprune.narrow(model, plan, weights=small)
    assert type(own) is Detector
    assert width(own, "backbone.stem.0") == width(small, "backbone.stem.0") < 8
    assert same_picture(dict(small.state_dict()), dict(own.state_dict()))


@pytest.mark.parametrize("level", ["bias", "sequential"])
def test_weights_of_a_compensated_model(level: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 5, 6, bias=False), nn.Flatten())
    small = fxprune.compress(model, BATCHES, 0.5, compensate=level, progress=False)
    plan = small.meta["fxprune"].plan
    own = fxprune.narrow(model, plan, weights=small)
    assert own[2].bias is not None
    assert own[2].bias is not small.get_submodule("2").bias
    assert difference(outputs(small, images()(3)), outputs(own, images()(3))) < 1e-6
    assert difference(outputs(fxprune.narrow(model, plan), images()(3)), outputs(own, images()(3))) > 1e-3


def test_weights_have_to_be_of_the_plan() -> None:
    model = ZOO["residual"].build()
    small = fxprune.apply(model, planned(model, images()(2), 0.1))
    for other in (small, model):
        with pytest.raises(NarrowError, match=r"weights is a Residual that was not made by this plan: give what apply"):
            fxprune.narrow(model, planned(model, images()(2), 0.9), weights=other)


def test_weights_have_to_be_of_the_model() -> None:
    model, larger = (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, outputs)) for outputs in (2, 4))
    plan = fxprune.Plan.from_kept(model, torch.randn(2, 3), {"0": [1, 2, 4]})
    small = fxprune.apply(model, plan)
    with pytest.raises(
        NarrowError, match=r"weights has 2\.weight of shape \(2, 3\), and that of Sequential is \(4, 3\)"
    ):
        fxprune.narrow(larger, plan, weights=small)


def test_a_plan_of_another_model() -> None:
    model = ZOO["residual"].build()
    with pytest.raises(PlanError, match="the plan names 'a', which has no channels there"):
        fxprune.narrow(model, planned(Literal(), images()(2)))


def test_a_layer_that_is_mended_is_named() -> None:
    model = ZOO["channel_shuffle_module"].build()
    with pytest.raises(NarrowError, match=r"places of channels at \d, a ChannelShuffle.*, which apply mends: use"):
        fxprune.narrow(model, planned(model, ZOO["channel_shuffle_module"].example(2)))


def test_a_graph_has_no_class_of_its_own() -> None:
    model = ZOO["residual"].build()
    plan = planned(model, images()(2))
    with pytest.raises(
        NarrowError, match=r"Residual is a graph already, with no forward of its own: use fxprune\.apply"
    ):
        fxprune.narrow(fxprune.apply(model, plan), plan)


class Heads(nn.Module):
    """Attention whose forward names its numbers by attributes, in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.size, self.width, self.parts = how, 4, 3, 12, [12, 12, 12]
        self.qkv, self.out, self.head = nn.Linear(6, 36), nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        split = {"list": self.parts, "tuple": (self.width,) * 3, "one": self.width}.get(self.how, 3 * [self.width])
        q, k, v = self.qkv(x).split(split, dim=-1)
        if self.how == "slices":
            y = self.qkv(x)
            q, k, v = y[..., : self.width], y[:, :, self.width : -self.width], y[..., -self.width :]
        if self.how == "batched":
            q, k, v = (y.view(b, t, -1, self.size).transpose(1, 2).reshape(b * self.heads, t, -1) for y in (q, k, v))
            y = (torch.bmm(q, k.transpose(1, 2)) * 3**-0.5).softmax(-1) @ v
            y = y.view(b, self.heads, t, self.size)
        else:
            q, k, v = (y.view(b, t, self.heads, self.size).transpose(1, 2) for y in (q, k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(b, t, self.heads * self.size if self.how == "product" else self.width)
        return self.head(x + self.out(y))


@pytest.mark.parametrize("how", ["list", "tuple", "one", "product", "slices", "batched"])
def test_attributes_that_name_widths_are_given_the_kept_numbers(how: str) -> None:
    torch.manual_seed(0)
    model, example = Heads(how).eval(), torch.randn(2, 4, 6)
    plan, before = planned(model, example), picture(model)
    own: Any = fxprune.narrow(model, plan)
    assert same_picture(before, picture(model))
    kept = len(plan.keep["qkv"]) // 9
    assert kept < 4
    assert (own.heads, own.size) == (kept, 3)
    assert (own.parts if how == "list" else [own.width] * 3) == [3 * kept] * 3
    assert type(own.heads) is type(own.width) is int
    other = torch.randn(3, 5, 6)
    assert difference(outputs(fxprune.apply(model, plan), other), outputs(own, other)) < 1e-6


@layers(lambda: dict(c=6, a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(6, 6, 1), head=nn.Linear(12, 5)))
def Halves(self, x: Tensor) -> Tensor:
    """Both halves are named by one attribute."""
    one, two = self.a(x).split((self.c, self.c), 1)
    return self.head(torch.cat([one, self.b(two)], 1).relu().mean((2, 3)))


def test_one_attribute_cannot_be_two_numbers() -> None:
    model = Halves()
    plan = fxprune.Plan.from_kept(model, images()(2), {"a": [0, 1, 2, 6, 7]})
    with pytest.raises(NarrowError, match=r"at split, which apply mends \(.*self\.a\(x\)\.split\(\(self\.c, self\.c\)"):
        fxprune.narrow(model, plan)
    own: Any = fxprune.narrow(model, fxprune.Plan.from_kept(model, images()(2), {"a": [0, 1, 2, 6, 7, 8]}))
    assert own.c == 3


def test_an_attribute_that_also_scales_is_refused() -> None:
    @layers(lambda: dict(c=6, a=nn.Linear(4, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 5)))
    def Scaled(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).view(-1, self.c) / self.c)

    model = Scaled()
    with pytest.raises(NarrowError, match=r"at view, which apply mends|at truediv, which apply mends"):
        fxprune.narrow(model, planned(model, torch.randn(2, 4)))


@layers(
    lambda: dict(heads=4, width=12, a=nn.Linear(6, 12), q=nn.Linear(12, 12), out=nn.Linear(12, 8), head=nn.Linear(8, 5))
)
def Checked(self, x: Tensor) -> Tensor:
    """Checks its width, and divides it by its number of heads."""
    b, t, _ = x.shape
    x = self.a(x).relu()
    if x.shape[-1] != self.width:
        raise ValueError(f"{x.shape[-1]} is not {self.width}")
    y = self.q(x)
    y = y.view(b, t, self.heads, y.shape[-1] // self.heads).transpose(1, 2)
    assert y.shape == (b, self.heads, t, 3)
    y = torch.nn.functional.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)
    return self.head(self.out(y))


def test_attributes_that_sizes_are_compared_with_or_divided_by() -> None:
    model, example = Checked().eval(), torch.randn(2, 4, 6)
    kept = {"a": [0, 2, 3, 5, 7, 8, 9], "q": [*range(3, 9)]}
    plan = fxprune.Plan.from_kept(model, example, kept)
    own: Any = fxprune.narrow(model, plan)
    assert (own.width, own.heads) == (7, 2)
    other = torch.randn(3, 5, 6)
    assert difference(outputs(fxprune.apply(model, plan), other), outputs(own, other)) < 1e-6
