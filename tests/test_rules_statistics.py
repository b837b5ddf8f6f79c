"""Statistics over channels that are not those of a plain norm: of weights, and of samples or positions as channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import outputs
from torch import Tensor, nn

import fxprune
from fxprune.coupling.groups import Group

ROWS = (1, 2, 3)  # the axes of a weight but that of its filters


def standardised(w: Tensor, **how: Any) -> Tensor:
    """As NFNet, ECA-NFNet and the ResNetV2 of BiT do it."""
    return F.batch_norm(w.reshape(1, w.shape[0], -1), None, None, training=True, momentum=0.0, **how).reshape_as(w)


def by_var_mean(w: Tensor) -> Tensor:
    var, mean = torch.var_mean(w, dim=ROWS, keepdim=True, unbiased=False)
    return (w - mean) / (var + 1e-5).sqrt()


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": standardised,
    "batch_norm with a gain": lambda w: standardised(w, weight=w.amax(ROWS)),
    "instance_norm": lambda w: F.instance_norm(w.reshape(1, w.shape[0], -1)).reshape_as(w),
    "group_norm, one group": lambda w: F.group_norm(w, 1),
    "group_norm, a group a filter": lambda w: F.group_norm(w.reshape(1, w.shape[0], -1), w.shape[0]).reshape_as(w),
    "layer_norm": lambda w: F.layer_norm(w, w.shape[1:]),
    "mean and std": lambda w: (w - w.mean(ROWS, keepdim=True)) / w.std(ROWS, keepdim=True),
    "var_mean": by_var_mean,
    "sum": lambda w: w - w.sum(ROWS, keepdim=True) / w[0].numel(),
    "demodulated": lambda w: w * w.square().sum(ROWS, keepdim=True).rsqrt(),
    "normalize": lambda w: F.normalize(w.flatten(1), 2, 1).view_as(w),
    "normalize several axes": lambda w: F.normalize(w, dim=ROWS),
    "norm": lambda w: w / w.flatten(1).norm(2, 1)[:, None, None, None],
    "einsum": lambda w: w / torch.einsum("oihw,oihw->o", w, w).sqrt()[:, None, None, None],
}
OF_SEVERAL_RESULTS = {"var_mean", "einsum"}  # which stay whole with inexact=True too


class Computed(nn.Module):
    """A convolution whose weight is computed from its parameter."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute, self.weight = compute, nn.Parameter(torch.randn(7, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self.weight))


class Between(nn.Module):
    """A step between a convolution and the rest."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last, self.step, self.layer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), step, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.layer, self.first(x))).mean((2, 3))


def images(samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 8, 8, dtype=torch.float64)


def pruned(model: nn.Module, **options: Any) -> tuple[dict[str, Group], fxprune.Plan]:
    """The groups of a model, and a plan that removes most of what may go: the small model is the masked original."""
    model.double().eval()
    graph = fxprune.capture(model, images())
    plan = fxprune.Scores.random(graph, images(), **options).plan(alpha=0.6)
    assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), images()) < 1e-9
    return {group.name: group for group in fxprune.couple(graph, **options)}, plan


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_statistic_over_the_channels_of_a_weight_keeps_them(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Computed(WEIGHTS[name]), nn.SiLU(), nn.Conv2d(7, 4, 3), nn.Flatten())
    groups, plan = pruned(model)
    assert "takes a statistic over the channels" in str(groups["0"].frozen)
    assert len(plan.keep["conv2d" if name != "einsum" else "1"]) < 7  # the filters go
    groups, plan = pruned(model, inexact=True)
    assert (groups["0"].frozen is None) == (name not in OF_SEVERAL_RESULTS)


def test_filters_of_a_computed_weight_are_those_of_the_callers_model() -> None:
    """What verify proves of the graph is so for the caller's model, whose next layer reads removed filters as zero."""
    torch.manual_seed(0)
    computed = Computed(standardised)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), computed, nn.SiLU(), nn.Conv2d(7, 4, 3), nn.Flatten()).double().eval()
    plan = fxprune.Scores.random(model, images()).plan(alpha=0.6)
    small = fxprune.apply(model, plan)
    gone = [unit for unit in range(7) if unit not in plan.keep["conv2d"]]
    model[3].weight.data[:, gone] = 0
    x = images(3)
    assert gone
    torch.testing.assert_close(outputs(small, x)[0], outputs(model, x)[0])


def _own(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def _rows(x: Tensor) -> Tensor:
    """(N, C, 6, 6) -> (N, 36, C)."""
    return x.flatten(2).transpose(1, 2)


def _back(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (6, 6))


BETWEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module | None, bool]] = {
    "channels": (lambda _, x: _own(x), None, False),
    "channels of each sample": (lambda _, x: _own(x.reshape(1, -1, 6, 6)).reshape_as(x), None, False),
    "pairs of channels": (lambda _, x: _own(x.unflatten(1, (4, 2))).flatten(1, 2), None, False),
    "samples": (lambda _, x: _own(x.transpose(0, 1)).transpose(0, 1), None, True),
    "rows": (lambda _, x: _own(x.transpose(1, 2)).transpose(1, 2), None, True),
    "tokens": (lambda _, x: _back(_own(_rows(x))), None, True),
    "tokens, by a layer": (
        lambda layer, x: _back(layer(_rows(x))), nn.BatchNorm1d(36, track_running_stats=False), True,
    ),
    "tokens, by running statistics": (lambda layer, x: _back(layer(_rows(x))), nn.BatchNorm1d(36), False),
    "tokens of a sample": (lambda layer, x: _back(layer(_rows(x))), nn.InstanceNorm1d(36), True),
    "tokens of a sample, by running statistics": (
        lambda layer, x: _back(layer(_rows(x))), nn.InstanceNorm1d(36, track_running_stats=True), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_a_batch_norm_by_statistics_of_its_input(name: str) -> None:
    step, layer, over_channels = BETWEEN[name]
    groups, _ = pruned(Between(step, layer))
    reason = str(groups["first"].frozen)
    assert ("takes a statistic over the channels" in reason) if over_channels else (groups["first"].frozen is None)


@pytest.mark.parametrize("inexact", [False, True])
def test_an_nfnet_of_timm(inexact: bool) -> None:
    """Its convolutions standardise their weights: by default, what they read stays."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_nfnet", pretrained=False, num_classes=4).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = fxprune.capture(model, images)
    plan = fxprune.Scores.random(graph, images, inexact=inexact).plan(alpha=0.5)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, torch.randn(3, 3, 32, 32, dtype=torch.float64)) < 1e-9
    reasons = {str(group.frozen) for group in fxprune.couple(graph, inexact=inexact)}
    assert any("batch_norm" in reason and "takes a statistic" in reason for reason in reasons) != inexact
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, model)]
    assert sizes[0] < sizes[1]


def test_the_report_says_why_the_inputs_of_a_standardised_weight_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Computed(standardised), nn.Conv2d(7, 4, 3), nn.Flatten()).double()
    loader = [(images(4), torch.arange(4))] * 2
    small = fxprune.compress(model, loader, 0.3, compensate="none", progress=False)
    assert "batch_norm (node batch_norm) takes a statistic over the channels" in str(fxprune.report(small))
