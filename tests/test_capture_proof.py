"""A captured graph is what the caller's model is, or it is refused with the likely reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, difference, outputs
from hostile import HOSTILE
from torch import Tensor, nn
from zoo import conv, head, images

import fxprune
from fxprune.errors import CaptureError, FxpruneWarning

Forward = Callable[..., Tensor]
RUNGS = ("fx", "values", "export")


class Net(nn.Module):
    """Three layers, with a forward of a test's between the first two."""

    def __init__(self, middle: Forward) -> None:
        super().__init__()
        self.a, self.b, self.head, self.middle = conv(3, 8), conv(8, 8), head(8), middle
        self.register_buffer("seen", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.middle(self, self.a(x)).relu()).relu())


def captured(model: nn.Module, rung: str, **options: Any) -> Any:
    """The graph by one rung, or the text of the error."""
    try:
        return fxprune.capture(model, images()(4), method=rung, **options)
    except CaptureError as error:
        return str(error)


def same(model: nn.Module, graph: nn.Module) -> bool:
    """Whether both give the same on batches of other sizes and values."""
    return all(difference(outputs(model, images()(n)), outputs(graph, images()(n))) < 1e-6 for n in (4, 1, 5))


# -- questions about values --------------------------------------------------------------------------------------------


FOREIGN = [name for name in HOSTILE if name.startswith(("questions-", "programs-"))][::3]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_every_way_of_capture_gives_the_model_or_refuses(name: str, rung: str) -> None:
    case = HOSTILE[name]
    model, example = case.build(), case.inputs(4, 0)
    try:
        graph = fxprune.capture(model, example, method=rung)
    except CaptureError:
        assert rung != "values" or case.wanted != "exact"
        return
    if case.wanted != "said":
        for size in (4, 1, 5):
            assert difference(outputs(model, case.inputs(size, 1)), outputs(graph, case.inputs(size, 1))) < 1e-6


@pytest.mark.parametrize("rung", RUNGS)
def test_the_exact_type_of_a_value_is_refused_with_the_line(rung: str) -> None:
    text = captured(Net(lambda net, x: x * 2 if type(x) is Tensor else x).eval(), rung)
    assert "gives other outputs than the model on a batch of 2 samples (by 0." in text
    assert "of their scale), first in what Net hands to b" in text


@pytest.mark.parametrize("rung", RUNGS)
def test_a_decision_by_the_recording_of_gradients_is_refused(rung: str) -> None:
    text = captured(Net(lambda net, x: x * 2 if torch.is_grad_enabled() else x).eval(), rung)
    assert "Likely: it decides by whether gradients are recorded: give the decision an argument of its own." in text


class ByType(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if type(x) is Tensor else x)


def test_the_likely_reason_names_the_line_and_the_ways_out() -> None:
    text = captured(ByType(lambda net, x: x).eval(), "auto")
    assert "ByType cannot be captured" in text
    assert "Likely: the forward asks for the exact type of a value; ask with isinstance (" in text
    assert "return super().forward(x * 2 if type(x) is Tensor else x))." in text
    assert "leaves=[its name]" in text


# -- random numbers and state ------------------------------------------------------------------------------------------


def test_random_numbers_from_elsewhere_are_refused_as_such() -> None:
    text = captured(Net(lambda net, x: x * float(np.random.rand())).eval(), "auto")
    assert "Likely: it draws random numbers that a graph does not hold: draw with torch" in text


@pytest.mark.parametrize("rung", ["fx", "values", "auto"])
def test_what_is_random_stays_random(rung: str) -> None:
    model = Net(lambda net, x: F.dropout(x, 0.5, training=True) + torch.rand_like(x)).eval()
    with pytest.warns(FxpruneWarning, match="Net draws random numbers in eval mode: its graph draws them, too"):
        graph = captured(model, rung)
    x = images()(3)
    assert not torch.equal(call(graph, x), call(graph, x))
    torch.manual_seed(3)
    wanted = call(model, x)
    torch.manual_seed(3)
    assert torch.equal(call(graph, x), wanted)


def counts(net: Any, x: Tensor) -> Tensor:
    net.seen.mul_(0.9).add_(x.mean((0, 2, 3)))
    net.calls += 1
    return x + net.seen.view(1, -1, 1, 1)


@pytest.mark.parametrize("compensate", ["none", "sequential"])
def test_buffers_keep_the_callers_numbers(compensate: Any) -> None:
    model = Net(counts).eval()
    model.seen += torch.arange(8.0)
    data = [(images()(4), torch.arange(4) % 3), (images()(4) + 1, torch.arange(4) % 3)]
    with pytest.warns(
        FxpruneWarning, match="the forward of Net changes seen, calls: the graph begins with the buffers"
    ):
        small = fxprune.compress(model, data, 0.5, compensate=compensate, progress=False)
    kept = list(small.meta["pruned"].plan.keep["a"])
    assert len(kept) < 8
    assert torch.equal(small.seen, torch.arange(8.0)[kept])
    assert (torch.equal(model.seen, torch.arange(8.0)), model.calls) == (True, 0)


# -- the comparison itself ---------------------------------------------------------------------------------------------


def test_another_batch_is_compared_too() -> None:
    """The example alone shows no difference."""
    model = Net(lambda net, x: x * 2 if float(x.abs().max()) > 100 else x).eval()
    with pytest.warns(FxpruneWarning, match="Net decides by the values of its input"):
        assert same(model, fxprune.capture(model, images()(2)))
    with (
        pytest.warns(FxpruneWarning),
        pytest.raises(CaptureError, match="other outputs than the model on a batch of 3"),
    ):
        fxprune.capture(model, images()(2), other=images()(4) * 1000)


def test_the_comparison_can_be_left_out() -> None:
    model = Net(lambda net, x: x * 2 if type(x) is Tensor else x).eval()
    graph = fxprune.capture(model, images()(2), prove=False)
    assert not same(model, graph)
    data = [(images()(4), torch.arange(4) % 3)]
    with pytest.raises(CaptureError, match="gives other outputs than the model"):
        fxprune.compress(model, data, 0.3, progress=False)
