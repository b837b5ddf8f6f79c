"""Coupling: which channels live or die together, in listings that a reader can check."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn
from zoo import ZOO, conv, head, images

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.errors import FxpruneError
from fxprune.tracing.graph import ModelGraph


def groups_of(model: nn.Module, example: Any = None, **options: Any) -> tuple[fxprune.Group, ...]:
    return fxprune.couple(fxprune.capture(model, images()(2) if example is None else example), **options)


def units_of(name: str) -> dict[str, list[int]]:
    """Site -> the unit of each channel of a zoo network."""
    case = ZOO[name]
    coupling = analyse(fxprune.capture(case.build(), case.example(2)))
    return {site.name: site.units.tolist() for site in coupling.sites}


def frozen(groups: tuple[fxprune.Group, ...]) -> dict[str, str | None]:
    """First site -> why its group stays."""
    return {group.sites[0].name: group.frozen for group in groups}


def test_the_listing_of_a_residual_network() -> None:
    assert "\n".join(map(str, groups_of(ZOO["residual"].build()))) == (
        "stem: 8 units, prunable\n"
        "  stem: 8 of 8 channels\n"
        "  a.conv2: 8 of 8 channels\n"
        "  read by a_conv1, b_conv1, down_0\n"
        "a.conv1: 8 units, prunable\n"
        "  a.conv1: 8 of 8 channels\n"
        "  read by a_conv2\n"
        "b.conv1: 12 units, prunable\n"
        "  b.conv1: 12 of 12 channels\n"
        "  read by b_conv2\n"
        "b.conv2: 12 units, prunable\n"
        "  b.conv2: 12 of 12 channels\n"
        "  down.0: 12 of 12 channels\n"
        "  read by head_2\n"
        "head.2: 5 units, frozen: it is the model's output\n"
        "  head.2: 5 of 5 channels"
    )


def test_halves_that_are_multiplied_go_in_pairs() -> None:
    units = units_of("split_then_add")
    assert units["a"][:8] == units["a"][8:]
    assert units["b"][:4] == units["b"][4:8] == units["b"][8:]
    assert len(set(units["a"])) == 8


def test_a_rolled_sum_ties_in_cycles() -> None:
    units = units_of("roll_then_add")["a"]
    assert units[:4] == units[4:8] == units[8:]
    assert len(set(units)) == 4


def test_a_linear_after_flatten_reads_blocks() -> None:
    case = ZOO["nhwc_flatten"]
    edges = analyse(fxprune.capture(case.build(), case.example(2))).edges
    (edge,) = [edge for edge in edges if edge.consumer == "b"]
    assert len(edge.units) == 8 * 16
    assert edge.units[:8].tolist() * 16 == edge.units.tolist()


def test_depthwise_convolutions_hand_on_what_others_read() -> None:
    """As readers of their own they would have a say in scores."""
    graph = fxprune.capture(ZOO["depthwise"].build(), images()(2))
    layer = {node.name: str(node.target) for node in graph.graph.nodes}
    readers = {layer[edge.consumer] for edge in analyse(graph).edges}
    assert {"5", "8"} <= readers
    assert not readers & {"2", "6", "9", "10"}


def test_grouped_convolutions_keep_their_groups_alike() -> None:
    units = units_of("resnext_block")
    middle = units["middle"]
    assert middle == middle[:4] * 4 or middle == [u for u in middle[::4] for _ in range(4)]


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("mlp", "4", "it is the model's output"),
        ("mean_over_channels", "b", "mean (node mean) takes a statistic over the channels"),
        ("max_over_channels", "b", "takes a statistic over the channels"),
        ("softmax_over_channels", "b", "softmax (node softmax) takes a statistic over the channels"),
        ("group_norm", "2", "GroupNorm 3 takes a statistic over the channels"),
        ("normalised_over_channels", "b", "takes a statistic over the channels"),
        ("state_given", "rnn.l0", "the initial state of rnn is given"),
        ("transformer_layer", "2", "LayerNorm 3.norm1 takes a statistic over the channels"),
    ],
)
def test_frozen_groups_say_why(name: str, site: str, reason: str) -> None:
    case = ZOO[name]
    assert reason in str(frozen(groups_of(case.build(), case.example(2)))[site])


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    "add": (
        lambda u, v: u + v, lambda u, v: torch.add(u, v), lambda u, v: u.add(v), lambda u, v: u.add_(v),
        lambda u, v: torch.stack([u, v]).sum(0), lambda u, v: torch.cat([u[:, :4] + v[:, :4], u[:, 4:] + v[:, 4:]], 1),
    ),
    "flatten": (
        lambda u, v: (u * v).flatten(1), lambda u, v: torch.flatten(u * v, 1), lambda u, v: (u * v).view(u.size(0), -1),
        lambda u, v: (u * v).reshape(-1, 8 * 64), lambda u, v: (u * v).reshape(u.shape[0], u.shape[1] * 64),
        lambda u, v: (u * v).flatten(2).flatten(1), lambda u, v: torch.cat((u * v).split(3, 1), 1).flatten(1),
    ),
    "halves": (
        lambda u, v: u[:, :4] * v[:, 4:], lambda u, v: u.chunk(2, 1)[0] * v.chunk(2, 1)[1],
        lambda u, v: u.split(4, 1)[0] * torch.split(v, [4, 4], 1)[1],
        lambda u, v: u.narrow(1, 0, 4) * v.narrow(1, 4, 4),
        lambda u, v: u[:, [0, 1, 2, 3]] * v.index_select(1, torch.tensor([4, 5, 6, 7])),
        lambda u, v: u.roll(4, 1)[:, 4:] * v.flip(1)[:, :4].flip(1),
    ),
    "shuffle by way of a grid, whose columns go together": (
        lambda u, v: u + v.view(v.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(v.shape),
        lambda u, v: u + v.unflatten(1, (2, 4)).permute(0, 2, 1, 3, 4).flatten(1, 2),
        lambda u, v: u + torch.stack(v.chunk(2, 1), 2).flatten(1, 2),
    ),
    "shuffle in one step": (
        lambda u, v: u + F.channel_shuffle(v, 2), lambda u, v: u + torch.channel_shuffle(input=v, groups=2),
        lambda u, v: u + v[:, [0, 4, 1, 5, 2, 6, 3, 7]],
    ),
    "largest": (
        lambda u, v: torch.maximum(u, v), lambda u, v: torch.max(u, v),
        lambda u, v: torch.stack([u, v], 1).amax(1), lambda u, v: torch.stack([u, v], -1).max(-1)[0],
        lambda u, v: torch.where(u > v, u, v), lambda u, v: -torch.minimum(-u, -v),
    ),
}  # fmt: skip


class Spelled(nn.Module):
    """Two convolutions, one expression of both, and a reader of what it gives."""

    def __init__(self, spelling: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.spelling = conv(3, 8), conv(3, 8), spelling
        flat = spelling(torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 8, 8))
        self.out = nn.Linear(flat.shape[1], 5) if flat.ndim == 2 else head(flat.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.spelling(self.a(x), self.b(x)))


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_operation_give_equal_groups(name: str) -> None:
    listings = set()
    for spelling in SPELLINGS[name]:
        coupling = analyse(fxprune.capture(Spelled(spelling), images()(2)))
        listings.add(tuple((site.name, tuple(site.units.tolist())) for site in coupling.sites))
    assert len(listings) == 1


# -- exclude -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "whole"),
    [
        ("a.conv1", {"a.conv1"}),
        (nn.Linear, set()),
        (["stem"], {"stem", "a.conv2"}),
        (["a"], {"stem", "a.conv1", "a.conv2"}),
        (["b.*"], {"b.conv1", "b.conv2", "down.0"}),
        (["*.conv1"], {"a.conv1", "b.conv1"}),
        ([nn.Conv2d], {"stem", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "down.0"}),
        (["down.0", nn.Linear], {"b.conv2", "down.0"}),
        ([], set()),
    ],
)
def test_excluded_layers_stay_whole(exclude: Any, whole: set[str]) -> None:
    model = ZOO["residual"].build()
    plan = fxprune.Scores.random(model, images()(2), exclude=exclude).plan(alpha=1.0)
    kept = {site for site in plan.keep if len(plan.keep[site]) == plan.widths[site]}
    assert kept == whole | {"head.2"}


def test_exclude_of_a_name_that_is_not_there() -> None:
    with pytest.raises(
        FxpruneError, match=r"exclude: no module of Residual matches 'layer9'; names are 'stem', .*a class of mod"
    ):
        groups_of(ZOO["residual"].build(), exclude=["layer9"])


# -- the network of sites and groups ----------------------------------------------------------------------------------


def test_the_graph_joins_groups_and_their_sites() -> None:
    net = analyse(fxprune.capture(ZOO["residual"].build(), images()(2))).graph()
    assert isinstance(net, nx.Graph)
    assert nx.is_bipartite(net)
    assert set(net["stem"]) == {"site stem", "site a.conv2"}
    assert net.edges["stem", "site stem"]["channels"] == 8


@layers(lambda: dict(a=nn.Linear(4, 6), b=nn.Linear(4, 6), head=nn.Linear(6, 2), table=nn.Buffer(torch.arange(6))))
def Gathered(self, x: Tensor) -> Tensor:
    """The channels of a convolution in the order of a table, added to those of another."""
    return self.head(self.a(x)[:, self.table] + self.b(x))


def partners(graph: ModelGraph) -> list[int]:
    """For every unit of `a`, the channel of `b` that is the same unit."""
    sites = {site.name: site.units.tolist() for site in analyse(graph).sites}
    return [sites["b"].index(unit) for unit in sites["a"]]


def test_a_graph_that_changed_is_looked_at_anew() -> None:
    graph = fxprune.capture(Gathered(), torch.zeros(2, 4))
    assert partners(graph) == [0, 1, 2, 3, 4, 5]
    graph.get_buffer("table").copy_(torch.tensor([5, 4, 3, 2, 1, 0]))
    assert partners(graph) == [5, 4, 3, 2, 1, 0]
    graph.table = torch.tensor([1, 0, 3, 2, 5, 4])
    assert partners(graph) == [1, 0, 3, 2, 5, 4]
    (added,) = [node for node in graph.graph.nodes if node.target is operator.add]
    added.args = (added.args[1], added.args[1])
    assert [[site.name for site in group.sites] for group in analyse(graph).prunable] == [["a"], ["b"]]


def test_a_channel_that_meets_the_input_stays() -> None:
    reasons = frozen(groups_of(ZOO["inputs_join"].build()))
    assert "meets values without channels in add" in str(reasons["back"])
    assert reasons["a"] is None


@pytest.mark.parametrize("how", ["expand", "interleave", "function"])
def test_heads_of_keys_go_with_the_queries_that_share_them(how: str) -> None:
    units = units_of(f"shared_keys_2_{how}")
    keys, queries = units["attention.k"], units["attention.q"]
    assert keys == units["attention.v"]
    assert len(set(keys)) == 2
    assert queries == [unit for unit in keys for _ in range(2)]
