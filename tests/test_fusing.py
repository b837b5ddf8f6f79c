"""Fusing: what scoring makes of a convolution and the BatchNorm behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import difference, outputs, picture, same_picture, squares
from torch import Tensor, fx, nn
from zoo import randomise

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.scoring.eval_graph import fuse


class Net(nn.Module):
    """A block whose first pair can be fused, and beside it what a test asks for."""

    def __init__(self, tail: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.fc, self.tail = nn.Linear(6, 4), tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.tail(self, x).mean((2, 3)))


def made(tail: Callable[[Net, Tensor], Tensor]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(tail)
    randomise(net)
    return net.double().eval(), torch.randn(5, 3, 8, 8, dtype=torch.float64)


def fused(net: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """A graph after fusing, and the layers that it calls."""
    graph = fxprune.capture(net, x)
    fuse(graph, analyse(graph).specs)
    return graph, [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


TAILS: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "a pair": (lambda net, x: net.bn2(net.conv2(x)).relu(), True),
    "a sum reads the convolution, too": (lambda net, x: (y := net.conv2(x)) + net.bn2(y), False),
    "the norm comes twice": (lambda net, x: net.bn2(net.bn2(net.conv2(x))), False),
    "the convolution comes twice": (lambda net, x: net.bn2(net.conv2(net.conv2(x).relu())), False),
    "something between": (lambda net, x: net.bn2(net.conv2(x).relu()), False),
}


@pytest.mark.parametrize("name", TAILS)
def test_pairs_become_one_layer_where_nothing_else_sees_them(name: str) -> None:
    tail, second = TAILS[name]
    net, x = made(tail)
    graph, called = fused(net, x)
    assert "fused_bn1" in called
    assert ("fused_bn2" in called) is second
    assert difference(outputs(net, x), outputs(graph, x)) < 1e-12


class Own(nn.BatchNorm2d):
    """A norm that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [Own(6), nn.BatchNorm2d(6, track_running_stats=False), nn.GroupNorm(2, 6)])
def test_other_norms_stay(norm: nn.Module) -> None:
    net, x = made(lambda net, x: net.bn2(net.conv2(x)))
    net.bn2 = norm.double().eval()
    graph, called = fused(net, x)
    assert "fused_bn1" in called
    assert "fused_bn2" not in called
    assert difference(outputs(net, x), outputs(graph, x)) < 1e-12


def test_a_norm_without_factors_and_a_training_model_fuse_as_in_eval_mode() -> None:
    net, x = made(lambda net, x: net.bn2(net.conv2(x)))
    net.bn2 = nn.BatchNorm2d(6, affine=False).double().eval()
    before = outputs(net, x)
    graph = fxprune.capture(net.train(), x)
    fuse(graph, analyse(graph).specs)
    assert graph.training
    assert graph.conv1.training
    assert difference(before, outputs(graph.eval(), x)) < 1e-12


def test_scores_are_those_of_the_layers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made(lambda net, x: net.bn2(net.conv2(x)).relu() + x)
    loader = [(x, torch.arange(5) % 2), (x[:3] + 1, torch.arange(3) % 2)]
    before = picture(net)
    one = fxprune.score(net, loader, squares, propose="separability", progress=False)
    assert same_picture(before, picture(net))
    monkeypatch.setattr("fxprune.scoring.loader_pass.fuse", lambda *_: None)
    two = fxprune.score(net, loader, squares, propose="separability", progress=False)
    np.testing.assert_allclose(one.propose, two.propose, rtol=1e-9)
    np.testing.assert_allclose(one.protect, two.protect, rtol=1e-9)
    assert one.moments.keys() == two.moments.keys()
    for key, moments in one.moments.items():
        np.testing.assert_allclose(moments.covariance, two.moments[key].covariance, rtol=1e-9, atol=1e-12)
