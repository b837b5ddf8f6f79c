"""What models cost, and what their values are like: on shapes alone, and the very same as on numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Case, tensors

import fxprune
from fxprune.batches import sample_count
from fxprune.capture import ModelGraph, passes, specs_on
from fxprune.cost import macs


def on_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass run on the numbers."""
    monkeypatch.setattr(passes, "places_of", lambda *_: set())


def found(graph: ModelGraph, example: Any) -> tuple[int, dict[str, Any]]:
    """The cost of a graph, and the specs of its values."""
    return macs(graph, example), specs_on(graph, example)


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_shapes_alone_tell_what_numbers_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = fxprune.capture(case.build(), case.example(2)), case.example(2)
    alone = found(graph, example)
    on_numbers(monkeypatch)
    assert alone == found(graph, example)
    specs = {node.name: node.meta["spec"] for node in graph.graph.nodes}
    assert sample_count(example) != 2 or specs == alone[1]


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


def test_numbers_are_used_where_an_operation_needs_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxprune"):
        graph = around(Picky())
    assert "Sequential runs on numbers" in caplog.text
    assert macs(graph, tensors(4)(5)) == 4 * 3 + 3 * 2


def test_nothing_of_a_pass_on_shapes_stays_in_the_model() -> None:
    graph = around(Careless())
    state = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    places = [parameter.data_ptr() for parameter in graph.parameters()]
    assert macs(graph, tensors(4)(5)) == 4 * 3 + 3 * 2
    assert graph.get_submodule("1").seen is None
    assert places == [parameter.data_ptr() for parameter in graph.parameters()]
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in graph.parameters())
    assert all(torch.equal(graph.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_batch_norm_of_another_width_is_found_on_shapes() -> None:
    with pytest.raises(fxprune.errors.CaptureError, match="does not run on the example"):
        fxprune.capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)), torch.zeros(2, 3, 4, 4))


def test_a_model_that_asks_for_the_device_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.ones(3, device=x.device)

    graph = fxprune.capture(Asks(), tensors(4)(2))
    alone = found(graph, tensors(4)(2))
    on_numbers(monkeypatch)
    assert alone == found(graph, tensors(4)(2))
