"""What models cost, and what their values are like: on shapes alone, and the very same as on numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torchvision
from helpers import part_of
from nets import layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import tensors

import fxprune
from fxprune.tracing import facts as passes
from fxprune.tracing.facts import facts_on, macs
from fxprune.tracing.graph import ModelGraph


def on_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass run on the numbers."""
    monkeypatch.setattr(passes, "places_of", lambda *_: set())


def found(graph: ModelGraph, example: Any) -> tuple[int, dict[str, Any]]:
    """The cost of a graph, and the specs of its values."""
    return macs(graph, example), facts_on(graph, example).specs


class Started(nn.Module):
    """Recurrent layers, or a cell, that are given a state."""

    def __init__(self, inner: nn.RNNBase | nn.RNNCellBase, *sizes: int) -> None:
        super().__init__()
        self.inner, self.sizes = inner, sizes

    def forward(self, x: Tensor) -> Any:
        state = x.new_zeros(self.sizes)
        return self.inner(x, (state, state) if isinstance(self.inner, (nn.LSTM, nn.LSTMCell)) else state)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrence_that_is_stepped_over_costs_what_it_does(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = issubclass(kind, nn.RNNCellBase)
    options: list[dict[str, Any]] = [{}, {"bias": False}]
    if not cell:
        options += [{"num_layers": 3, "bidirectional": True}, {"batch_first": True}]
    for given in options:
        inner = kind(6, 8, **given)
        states = () if cell else (6 if "num_layers" in given else 1,)
        many = (2,) if cell or "batch_first" in given else (4,)
        one, batch = (torch.randn(6), torch.randn(2, 6)) if cell else (torch.randn(4, 6), torch.randn(2, 4, 6))
        starts = [(one, Started(inner, *states, 8)), (batch, Started(inner, *states, *many, 8))]
        for x, model in [*((x, nn.Sequential(inner)) for x in (one, batch)), *starts]:
            with monkeypatch.context() as patch:
                graph = fxprune.capture(model, x)
                alone = found(graph, x)
                on_numbers(patch)
                assert alone == found(graph, x)


class Picky(nn.Module):
    """Looks at its numbers, and remembers them."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x if float(x.sum()) > -1e9 else -x


class Careless(Picky):
    """Remembers what it saw without a look at it."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x if self.seen is None else self.seen
        return x + self.seen.mean()


def around(inner: nn.Module) -> ModelGraph:
    torch.manual_seed(0)
    return fxprune.capture(nn.Sequential(nn.Linear(4, 3), inner, nn.Linear(3, 2)), tensors(4)(2), leaves=[type(inner)])


def test_nothing_of_a_pass_on_shapes_stays_in_the_model() -> None:
    with pytest.warns(fxprune.FxpruneWarning, match="forward of Sequential changes"):
        graph = around(Careless())
    state = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    places = [parameter.data_ptr() for parameter in graph.parameters()]
    assert macs(graph, tensors(4)(5)) == 4 * 3 + 3 * 2
    assert graph.get_submodule("1").seen is None
    assert places == [parameter.data_ptr() for parameter in graph.parameters()]
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in graph.parameters())
    assert all(torch.equal(graph.state_dict()[name], tensor) for name, tensor in state.items())


def torchs_count(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Multiply-accumulates by operation, as torch's flop counter has them when the model itself runs."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return {str(operation): flops // 2 for operation, flops in counter.get_flop_counts().get("Global", {}).items()}


NETWORKS: dict[str, dict[str, Any]] = {"mobilenet_v3_small": {}, "swin_t": {}, "vit_b_32": {"image_size": 64}}


@pytest.mark.parametrize("name", part_of(NETWORKS, 4))
def test_macs_are_those_that_torch_counts(name: str) -> None:
    """Attention runs as its two matrix products, since torch's counter passes over the kernel for the CPU."""
    model = torchvision.models.get_model(name, weights=None, **NETWORKS[name]).eval()
    images = torch.randn(2, 3, 64, 64)
    with sdpa_kernel(SDPBackend.MATH):
        counted = torchs_count(model, images)
    assert counted
    assert 2 * macs(fxprune.capture(model, images), images) == sum(counted.values())


@layers(lambda: dict(first=nn.Conv2d(4, 4, 3), second=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 4)))
def Repeats(self, x: Tensor) -> tuple[Tensor, ...]:
    """The same layers on images of one size and another, in one memory format and another, and with a value moved."""
    y = F.relu(self.norm(self.first(x)))
    last = self.second(y.contiguous(memory_format=torch.channels_last))
    rows, others = self.head(y.mean((2, 3))), self.head(last.mean((2, 3)))
    rows.t_()
    return self.second(x) + y, last * last, rows, others, self.head(others) + others


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_nodes_that_torch_does_not_run_cost_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and flops of layers by their formulas are those that torch finds."""
    model, images = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, 64, 64)
    facts_alike(model, images, monkeypatch)


def test_nodes_that_differ_in_size_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    facts_alike(Repeats(), torch.randn(2, 4, 9, 8), monkeypatch)


def facts_alike(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the facts of a graph with those that every node gives when it runs."""
    graph = fxprune.capture(model, images)
    alike = facts_on(graph, images)
    monkeypatch.setattr(passes._Recorder, "_known", lambda *_: None)
    assert facts_on(graph, images) == alike


@layers(lambda: dict(layer=nn.Linear(8, 3 * 8)))
def Attends(self, x: Tensor) -> Tensor:
    """Queries, keys and values of one linear layer, and attention."""
    q, k, v = self.layer(x).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def test_what_torchs_counter_passes_over_is_counted() -> None:
    """The kernel for attention on the CPU, and recurrent layers."""
    x = torch.randn(2, 5, 8)
    linear, attention = 5 * 8 * 24, 2 * 2 * 5 * 5 * 4
    assert sum(torchs_count(Attends(), x).values()) == 2 * linear
    assert macs(fxprune.capture(Attends(), x), x) == linear + attention
    lstm = nn.LSTM(8, 6, batch_first=True).eval()
    with torch.no_grad():
        assert sum(torchs_count(lstm, x).values()) == 0
    assert macs(fxprune.capture(lstm, x), x) == 5 * 4 * 6 * (8 + 6)


def test_norms_biases_and_what_goes_element_by_element_count_as_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Softmax(1)).eval()
    x = torch.randn(2, 3, 4, 4)
    assert torchs_count(model, x) == {}
    assert macs(fxprune.capture(model, x), x) == 0


def test_numbers_are_used_where_an_operation_needs_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxprune"):
        graph = around(Picky())
    assert "Sequential runs on numbers" in caplog.text
    assert macs(graph, tensors(4)(5)) == 4 * 3 + 3 * 2
