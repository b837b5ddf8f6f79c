"""Sizes: whatever a forward reads from its input follows the input in what is emitted, too."""

# ruff: noqa: RUF005 - shapes are put together in all the ways in which models do it

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs, part_of
from torch import Tensor, fx, nn
from zoo import CLASSES, conv

import fxprune
from fxprune.errors import RewriteError
from fxprune.planning.planned import planned_by
from fxprune.rewriting.oracle import oracle

Step = Callable[[Any, Tensor], Tensor]
SIZES = (1, 8, 8), (3, 8, 8), (5, 8, 8), (2, 8, 12), (3, 12, 6)  # samples, height and width; the example's are 2, 8, 8


class Around(nn.Module):
    """A step in the middle of a small network: 8 channels go in and come out; it has layers of both kinds to use."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.a, self.b, self.head = step, conv(3, 8), conv(8, 10), nn.Linear(10, CLASSES)
        self.same, self.quad, self.down, self.up = conv(8, 8), conv(4, 4), nn.Linear(8, 6), nn.Linear(6, 8)
        self.qkv, self.wide, self.two, self.narrow = nn.Linear(8, 24), conv(10, 8), conv(2, 8), conv(4, 8)
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.token, self.bias = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.step(self, self.a(x))).relu().mean((2, 3)))


def images(samples: int, height: int = 8, width: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 3, height, width, generator=draw, dtype=torch.float64)


STEPS: dict[str, Step] = {
    # the shape of another tensor, which is narrowed in another way
    "reshape": lambda m, x: m.same(x).flatten(1).reshape(x.shape),
    "torch.reshape": lambda m, x: torch.reshape(m.same(x).flatten(1), shape=x.shape),
    "view of sizes": lambda m, x: m.same(x).flatten(1).view(*x.size()),
    "view_as": lambda m, x: m.same(x).flatten(1).view_as(x),
    "reshape_as": lambda m, x: m.same(x).flatten(1).reshape_as(x),
    "expand": lambda m, x: m.same(x).mean((2, 3), keepdim=True).expand(x.shape),
    "expand_as": lambda m, x: m.same(x).mean((2, 3), keepdim=True).expand_as(x),
    "broadcast_to": lambda m, x: torch.broadcast_to(m.same(x).mean((2, 3), keepdim=True), x.shape),
    "tokens": lambda m, x: m.up(m.down(x.flatten(2).mT).relu()).mT.reshape(x.shape),
    "recurrent": lambda m, x: m.up(m.gru(x.flatten(2).mT, x.new_zeros(1, len(x), 6))[0]).mT.reshape(x.shape),
    # shapes put together
    "number + shape": lambda m, x: m.same(x).flatten(2).reshape((x.shape[0], 8) + x.shape[2:]),
    "shape + numbers": lambda m, x: m.same(x).flatten(2).reshape(x.shape[:2] + (x.shape[2], x.shape[3])),
    "shape + number + shape": lambda m, x: m.same(x).flatten(1).reshape(x.shape[:1] + (8,) + x.shape[-2:]),
    "stars": lambda m, x: m.same(x).flatten(2).reshape([*x.shape[:1], 8, *x.shape[2:]]),
    # channels folded into the batch
    "fold by -1": lambda m, x: m.quad(x.reshape(-1, 4, *x.shape[2:])).reshape(x.shape),
    "fold by a product": lambda m, x: m.quad(x.reshape(x.size(0) * x.size(1) // 4, 4, *x.shape[2:])).view(x.size()),
    "fold by numel": lambda m, x: m.quad(x.reshape(x.numel() // (4 * x[0, 0].numel()), 4, *x.shape[2:])).view_as(x),
    "fold by unflatten": lambda m, x: (
        m.quad(x.unflatten(1, (2, 4)).flatten(0, 1)).unflatten(0, (x.shape[0], 2)).flatten(1, 2)
    ),
    "halves": lambda m, x: torch.cat(m.quad(torch.cat(x.chunk(2, 1))).split(x.shape[0]), 1),
    "stacked halves": lambda m, x: (
        m.quad(torch.stack(x.chunk(2, 1)).flatten(0, 1)).view(2, -1, 4, *x.shape[2:]).transpose(0, 1).reshape(x.shape)
    ),
    "each channel": lambda m, x: F.max_pool2d(x.reshape(-1, 1, *x.shape[2:]), 3, 1, 1).reshape(x.shape),
    "groups of a batch": lambda m, x: F.conv2d(
        x.reshape(1, -1, *x.shape[2:]), x.mean((2, 3)).view(-1, 1, 1, 1), groups=x.shape[0] * x.shape[1]
    ).reshape(x.shape),
    # positions beside channels
    "unflatten channels and positions": lambda m, x: m.same(x.flatten(1).unflatten(1, (8, *x.shape[2:]))),
    "unflatten a shape": lambda m, x: m.same(m.same(x).flatten(1).unflatten(1, x.shape[1:])),
    "chunk": lambda m, x: m.narrow(x.flatten(1).chunk(2, 1)[0].reshape(x.shape[0], 4, *x.shape[2:])),
    "split": lambda m, x: m.narrow(
        x.flatten(1).split(x.shape[1] * x.shape[2] * x.shape[3] // 2, 1)[1].reshape(x.shape[0], 4, *x.shape[2:])
    ),
    "pixel shuffle": lambda m, x: m.two(
        x.view(len(x), 2, 2, 2, *x.shape[2:]).permute(0, 1, 4, 2, 5, 3).reshape(
            len(x), 2, 2 * x.shape[2], 2 * x.shape[3]
        )
    ),
    "pad": lambda m, x: m.wide(F.pad(x, (0, x.shape[2] % 3, 0, 0, 1, 1))[..., : x.shape[3]]),
    "pad to a width": lambda m, x: m.wide(F.pad(x, (0, 0, 0, 0, 0, 10 - x.shape[1]))),
    "class token": lambda m, x: (
        m.up(m.down(torch.cat([m.token.expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)))[:, 1:].mT.reshape(x.shape)
    ),
    # numbers and tensors made of sizes
    "product": lambda m, x: m.same(x / math.prod(x.shape[1:])),
    "numel of a shape": lambda m, x: m.same(x + x.shape.numel() * 1e-4),
    "size of a fold": lambda m, x: m.same(x / x.flatten(0, 1).shape[0] / x.flatten(1).shape[1]),
    "zeros": lambda m, x: m.same(x) + torch.zeros(x.shape).to(x),
    "zeros of a fold": lambda m, x: m.same(x + x.new_ones(x.flatten(0, 1).shape).sum() / x.numel()),
    "more channels": lambda m, x: m.wide(torch.cat([x, x.new_zeros(x.shape[0], 2, *x.shape[2:])], 1)),
    "full": lambda m, x: m.same(x) + torch.full((x.shape[0], x.shape[1], 1, 1), 0.5).to(x),
    "parameters repeated": lambda m, x: m.same(x + m.bias.repeat(x.shape[0], 1, 1, 1)),
    "layer norm": lambda m, x: m.same(F.layer_norm(x, (x.shape[1], *x.shape[2:]))),
    "layer norm of a shape": lambda m, x: m.same(F.layer_norm(x, x.shape[1:])),
    "depthwise": lambda m, x: m.same(F.conv2d(x, m.bias[:, :1].expand(x.shape[1], 1, 1, 1), groups=x.shape[1])),
    "indices": lambda m, x: m.same(x[torch.arange(x.shape[0])][:, torch.arange(x.shape[1] - 1, -1, -1)]),
}  # fmt: skip


def attention(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    q, k, v = (y.view(batch, -1, 2, 4).transpose(1, 2) for y in m.qkv(x.flatten(2).mT).chunk(3, -1))
    q, k, v = (y.reshape(batch * 2, -1, 4) for y in (q, k, v))
    y = torch.bmm(torch.bmm(q, k.mT).mul(channels**-0.5).softmax(-1), v)
    y = y.view(batch, 2, height * width, 4).transpose(1, 2).reshape(batch, height * width, channels)
    return m.up(m.down(y)).mT.reshape(x.shape)


def windows(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.permute(0, 2, 3, 1).view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
    y = m.up(m.down(y.reshape(-1, 4, channels)).relu())
    y = y.view(y.shape[0] // (height * width // 4), height // 2, width // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def masks(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    batch, length, channels = tokens.shape
    seen = (x.mean(1).flatten(1) > 0)[:, None, None].expand(batch, 2, length, length).reshape(-1, length, length)
    q, k, v = (y.view(batch, length, 2, 4).transpose(1, 2).flatten(0, 1) for y in m.qkv(tokens).chunk(3, -1))
    y = (q @ k.mT).masked_fill(~seen, -1e4).softmax(-1) @ v
    y = y.view(batch, 2, length, channels // 2).transpose(1, 2).reshape(batch, length, channels)
    return m.up(m.down(y)).mT.reshape(x.shape)


STEPS |= {"masks spread over heads": masks}
STEPS |= {"attention with heads in the batch": attention, "windows in the batch": windows}


def modulated(m: Any, x: Tensor) -> Tensor:
    weight = (m.same.weight[None] * x.mean((2, 3))[:, None, :, None, None]).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, padding=1, groups=x.shape[0])
    return y.reshape(x.shape[0], -1, *x.shape[2:])


OTHERS: dict[str, Step] = {
    "an index over axis 0": lambda m, x: m.narrow(x.flatten(0, 1)[::2].unflatten(0, (x.shape[0], -1))),
    "an index over axis 1": lambda m, x: m.same(x.flatten(1)[:, torch.arange(x[0].numel())].view(x.shape)),
    "modulated": modulated,
}


@functools.cache
def scores_of(name: str, method: str, *, inexact: bool = False, samples: int = 2) -> tuple[Any, fxprune.Scores]:
    """A graph of the network around a step, and random scores of it."""
    graph = fxprune.capture(Around((STEPS | OTHERS)[name]).double().eval(), images(samples), method=method)
    return graph, fxprune.Scores.random(graph, images(samples), inexact=inexact)


def agree(graph: Any, plan: fxprune.Plan) -> None:
    """The emitted graph gives what the zero-masked original gives, on all sizes on which the original runs."""
    assert any(len(kept) < plan.widths[site] for site, kept in plan.keep.items())
    small, masked = fxprune.apply(graph, plan), oracle(*planned_by(graph, plan))
    for size in SIZES:
        assert difference(outputs(masked, images(*size)), outputs(small, images(*size))) < 1e-9, size


FOLDED = [name for name in STEPS if "fold" in name or "batch" in name or "halves" in name or "channel" in name]


@pytest.mark.parametrize(
    ("name", "samples"), part_of([*((name, 2) for name in STEPS), *((name, 1) for name in FOLDED)], 4)
)
def test_the_emitted_graph_runs_on_whatever_the_original_runs_on(name: str, samples: int) -> None:
    graph, scores = scores_of(name, "auto", samples=samples)
    for alpha in (0.3, 0.6):
        agree(graph, scores.plan(alpha=alpha))


@pytest.mark.parametrize("name", ["fold by -1", "tokens", "expand", "unflatten a shape", "chunk", "layer norm"])
def test_on_the_other_way_of_capture(name: str) -> None:
    graph, scores = scores_of(name, "values")
    agree(graph, scores.plan(alpha=0.6))


@pytest.mark.parametrize("name", ["layer norm", "layer norm of a shape"])
def test_statistics_over_channels_that_go(name: str) -> None:
    graph, scores = scores_of(name, "auto", inexact=True)
    assert "a" not in scores.plan(alpha=0.6).frozen
    agree(graph, scores.plan(alpha=0.6))


def test_only_the_entry_of_the_channels_is_another() -> None:
    graph, scores = scores_of("reshape", "auto")
    plan = scores.plan(alpha=0.6)
    small: Any = fxprune.apply(graph, plan)
    a, same = len(plan.keep["a"]), len(plan.keep["same"])
    (node,) = (node for node in small.graph.nodes if node.target == "reshape")
    entries = [str(entry.target if isinstance(entry, fx.Node) else entry) for entry in node.args[1:]]
    assert entries == [str(operator.getitem), str(operator.floordiv), *[str(operator.getitem)] * 2]
    assert f" // {a // math.gcd(a, same)}" in small.code


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_over_channels_and_more_is_refused(axis: int, samples: int) -> None:
    graph, scores = scores_of(f"an index over axis {axis}", "auto", samples=samples)
    expected = f"axis {axis} of flatten holds more than channels, and no index fits all of its lengths"
    with pytest.raises(RewriteError, match=expected):
        fxprune.apply(graph, scores.plan(alpha=0.6))


@pytest.mark.parametrize("samples", [1, 2])
def test_channels_of_all_samples_along_one_axis_stay(samples: int) -> None:
    graph, scores = scores_of("modulated", "auto", samples=samples)
    plan = scores.plan(alpha=0.6)
    reason = next(reason for reason, sites in plan.frozen.items() if "a" in sites)
    assert reason.startswith("the channels of all samples lie along one axis in conv2d")
    agree(graph, plan)
