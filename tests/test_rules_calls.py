"""Calls in spellings that torch takes and that are seldom written: exact, or with a reason or an error of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs
from torch import Tensor, nn

import fxprune


class Calls(nn.Module):
    """A step between two convolutions, with a few layers and tensors for it."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.first, self.last = step, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)
        self.flow, self.lift = nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("one", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self, self.first(x))).mean((2, 3))


def images(samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 8, 8)


def rows(x: Tensor) -> Tensor:
    """(N, C, 8, 8) -> (N, 64, C)."""
    return x.flatten(2).transpose(1, 2)


def back(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (8, 8))


def each(own: Any, x: Tensor) -> Tensor:
    """The weight once for every sample."""
    return own.weight.expand(x.shape[0], -1, -1)


def twice(x: Tensor) -> Tensor:
    """The sum of two names of what the call has changed."""
    return F.relu(x, True) + x


def looked_up(own: Any, x: Tensor, **names: Any) -> Tensor:
    return F.grid_sample(**names, grid=own.flow(x).permute(0, 2, 3, 1).tanh(), input=x, align_corners=False)


EXACT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "groups from the shape": lambda _, x: F.group_norm(x, x.shape[1]),
    "half as many groups": lambda _, x: F.group_norm(num_groups=x.size(1) // 2, input=x),
    "groups from another shape": lambda own, x: F.group_norm(x, own.weight.shape[0]),
    "a grid of coordinates": looked_up,
    "a grid of three coordinates": lambda own, x: F.grid_sample(
        x[:, :, None], own.lift(x)[:, :, None].permute(0, 2, 3, 4, 1).tanh(), align_corners=False
    )[:, :, 0],
    "coordinates from the channels": lambda _, x: F.grid_sample(
        x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False
    ),
    "no channels in front": lambda _, x: torch.cat([x[:, :0], x], 1),
    "no channels behind": lambda _, x: torch.cat([x, x[:, x.shape[1] :]], 1),
    "no channels from the middle": lambda _, x: torch.cat([x[:, -4:4], x], 1),
    "no channels by a list": lambda _, x: torch.cat([x[:, []], x], 1),
    "no channels by a split": lambda _, x: torch.cat(x.split([0, 8], 1)[::-1], 1),
    "nothing at all": lambda _, x: torch.cat([torch.empty(0), x], 1),
    "no rows": lambda _, x: torch.cat([x[:, :, :0], x], 2),
    "no rows of a fixed number": lambda _, x: torch.cat([x.new_zeros(x.shape[0], 8, 0, 8), x], 2),
    "no samples": lambda _, x: torch.cat([x, x[:0]], 0),
    "no rows that meet channels": lambda own, x: torch.cat([x[:, :, :0] + own.weight[0, :, None, None], x], 2),
    "a product of none": lambda _, x: x * x[:, :0].prod(1, keepdim=True),
    "a product over no channels": lambda _, x: x + (rows(x)[..., :0] @ x.flatten(2)[:, :0]).mean(),
    "a linear layer of none": lambda own, x: x + F.linear(rows(x)[..., :0], own.weight[:, :0]).mean(),
    "the bits as integers": lambda _, x: x.view(torch.int32).view(dtype=torch.float32),
    "without the lowest bits": lambda _, x: (x.view(torch.int32) & ~255).view(torch.float32),
    "padded to a size": lambda _, x: F.pad(x, (0, 12 - x.shape[3])),
    "padded by a tensor": lambda own, x: F.pad(x, (0, own.one)),
    "padded by a number of the data": lambda _, x: F.pad(x, (0, (x.sum() * 0).long() + 1)),
    "padded by the number of channels": lambda _, x: F.pad(x, (x.shape[1] - 6, 0)),
    "channels padded to a size": lambda _, x: F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1])),
    "baddbmm": lambda own, x: back(torch.baddbmm(batch2=each(own, x), input=rows(x), batch1=rows(x))),
    "method baddbmm": lambda own, x: back(rows(x).baddbmm(batch2=each(own, x), batch1=rows(x), alpha=0.5)),
    "addmm": lambda own, x: (
        x * torch.addmm(mat2=own.weight, mat1=x.mean((2, 3)), input=x.amax((2, 3)))[:, :, None, None]
    ),
    "addbmm": lambda own, x: (
        x + torch.addbmm(input=own.weight[:, :1], batch1=each(own, x), batch2=x.flatten(2)[..., :1])[:, :, None]
    ),
    "axis and keepdims": lambda _, x: x * x.mean(axis=(2, 3), keepdims=True),
    "parts by keyword": lambda _, x: torch.cat(axis=1, tensors=[x.narrow(length=3, start=5, dim=1), x.narrow(1, 0, 5)]),
    "a whole number as p": lambda _, x: F.normalize(x, 1, 3),
    "the last axis of gumbel_softmax": lambda _, x: x + 0 * F.gumbel_softmax(x),
    "in place by position": lambda _, x: twice(x + 0),
    "rolled by the number of channels": lambda _, x: x.roll(x.shape[1] - 5, 2),
    "rows by the number of channels": lambda _, x: x[:, :, x.shape[1] - 7 : x.shape[1] - 1],
    "turned by the number of channels": lambda _, x: x.rot90(x.shape[1] - 7, (2, 3)),
    "a triangle by the number of channels": lambda _, x: x.tril(x.shape[1] - 9),
    "as large as there are channels": lambda _, x: F.interpolate(x, size=(x.shape[1] + 2, x.shape[3])),
    "as many groups as channels": lambda own, x: F.conv2d(x, own.weight[:, :1, None, None], groups=x.shape[1]),
}  # fmt: skip
WHOLE: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "halves of numbers": (lambda _, x: x.view(torch.int16).view(torch.float32), "by their bits in view"),
    "one group by the shape": (lambda _, x: F.group_norm(x, x.shape[1] // 8), "statistic over the channels"),
    "a whole number as p": (lambda _, x: F.normalize(x, 2, 1), "statistic over the channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:Calls draws random numbers in eval mode")
def test_a_call_that_is_exact(name: str) -> None:
    model = Calls(EXACT[name]).double().eval() if "bits" not in name else Calls(EXACT[name]).eval()
    inputs = images().to(model.weight.dtype)
    graph = fxprune.capture(model, inputs)
    assert difference(outputs(model, inputs), outputs(graph, inputs)) == 0
    plan = fxprune.Scores.random(graph, inputs).plan(alpha=0.8)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, images(3).to(inputs)) < (1e-9 if inputs.dtype == torch.float64 else 1e-5)
    assert len(plan.keep["first"]) < 8


@pytest.mark.parametrize("name", WHOLE)
def test_a_call_whose_channels_stay(name: str) -> None:
    step, reason = WHOLE[name]
    groups = {group.name: group for group in fxprune.couple(fxprune.capture(Calls(step), images()))}
    assert reason in str(groups["first"].frozen)


def test_coordinates_stay_whole_with_their_reason() -> None:
    groups = {group.name: group for group in fxprune.couple(fxprune.capture(Calls(looked_up), images()))}
    assert groups["flow"].frozen == "gives grid_sample (node grid_sample) its coordinates"
    assert groups["first"].frozen is None


def test_places_of_a_call_that_no_rule_can_take_are_named() -> None:
    """`where` with a condition alone gives places, one tensor an axis: the rule is for the one that chooses."""
    model = Calls(lambda _, x: x + torch.where(x > 9)[0].sum())
    with pytest.raises(
        fxprune.UnsupportedOpError, match=r"rule for function .*where cannot take node where, File .*py"
    ):
        fxprune.couple(fxprune.capture(model, images()))


def test_an_argument_under_a_name_that_python_has_no_place_for() -> None:
    model = Calls(lambda _, x: x + x.clone().uniform_(**{"from": 0.0, "to": 1.0}))
    with pytest.raises(fxprune.CaptureError, match="uniform_ is given 'from' by name, which is no name in Python"):
        fxprune.capture(model, images(), method="fx")


def half_turned(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat([-x[..., middle:], x[..., :middle]], -1)


class Rotary(nn.Module):
    """Attention whose places are turned up to `turned`, as in Phi-3: one of the two parts may be empty."""

    def __init__(self, turned: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.register_buffer("angles", torch.randn(5, turned))

    def turn(self, x: Tensor) -> Tensor:
        turned = self.angles.shape[-1]
        first, rest = x[..., :turned], x[..., turned:]
        return torch.cat([first * self.angles.cos() + half_turned(first) * self.angles.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 6).transpose(1, 2) for layer in (self.query, self.key, self.value))
        weights = (self.turn(q) @ self.turn(k).transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("turned", [0, 2, 6])
@pytest.mark.parametrize("head_dim", [False, True])
def test_heads_leave_a_rotary_attention(turned: int, head_dim: bool) -> None:
    model, x = Rotary(turned).double().eval(), torch.randn(2, 5, 24, dtype=torch.float64)
    graph = fxprune.capture(model, x)
    plan = fxprune.Scores.random(graph, x, head_dim=head_dim).plan(alpha=0.6)
    assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), torch.randn_like(x)) < 1e-9
    assert len(plan.keep["value"]) < 24
    assert len(plan.keep["query"]) < 24 or (head_dim and turned != 2)
