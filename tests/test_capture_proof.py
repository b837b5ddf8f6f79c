"""A captured graph is what the caller's model is, or it is refused with the likely reason."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, difference, outputs
from torch import Tensor, nn
from zoo import conv, head, images, tensors

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


@functools.singledispatch
def dispatched(value: Any) -> Any:
    return value


@dispatched.register
def _(value: Tensor) -> Tensor:
    return value * 2


def matched(net: Any, x: Tensor) -> Tensor:
    return {True: lambda: x * 2, False: lambda: x}[isinstance(x, (list, Tensor))]()


def swallowed(net: Any, x: Tensor) -> Tensor:
    try:
        return x * len(x.shape) if int(x.shape[1]) == 8 else x
    except Exception:  # noqa: BLE001 - as a careless forward does
        return x


def tried(net: Any, x: Tensor) -> Tensor:
    try:
        return x * 2 if bool((x == x).all()) else x
    except Exception:  # noqa: BLE001 - as a careless forward does
        return x


QUESTIONS: dict[str, Forward] = {
    "isinstance": lambda net, x: x * 2 if isinstance(x, Tensor) else x,
    "isinstance of several": matched,
    "is_tensor": lambda net, x: x * 2 if torch.is_tensor(x) else x,
    "singledispatch": lambda net, x: dispatched(x),
    "callable": lambda net, x: x if callable(x) else x * 2,
    "hasattr": lambda net, x: x if hasattr(x, "tensors") else x * 2,
    "getattr with a default": lambda net, x: x * getattr(x, "weight_of", 2),
    "grad_fn": lambda net, x: x if hasattr(x, "grad_fn_of_mine") else x * 2,
    "int": lambda net, x: x * 2 if isinstance(x.shape[1], int) else x,
    "shape": lambda net, x: x * 2 if isinstance(x.shape, tuple) else x,
    "jit": lambda net, x: x if torch.jit.is_tracing() or torch.jit.is_scripting() else x * 2,
    "fx": lambda net, x: x if torch.fx._symbolic_trace.is_fx_tracing() else x * 2,
    "compiler": lambda net, x: x if torch.compiler.is_compiling() else x * 2,
    "caught errors": swallowed,
    "caught decisions": tried,
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.filterwarnings("ignore:Net decides by the values of its input")
def test_a_question_is_answered_as_a_tensor_does_or_refused(name: str, rung: str) -> None:
    model = Net(QUESTIONS[name]).eval()
    graph = captured(model, rung)
    if rung == "values":
        assert same(model, graph), graph
    elif isinstance(graph, str):
        assert "symbolic tracing does not know" in graph or "gives other outputs than the model" in graph, graph
    else:
        assert same(model, graph)


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


# -- what is computed outside of the graph -----------------------------------------------------------------------------


def gate(a: Tensor) -> Tensor:
    return torch.tanh(a) * torch.sigmoid(a)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit is deprecated
    scripted = torch.jit.script(gate)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


OUTSIDE: dict[str, Forward] = {
    "script": lambda net, x: scripted(x),
    "vmap": lambda net, x: x * torch.vmap(lambda z: z.norm() / 10, in_dims=1)(x).view(1, -1, 1, 1),
    "vmap over samples": lambda net, x: torch.vmap(lambda z: z * z.mean())(x),
    "grad": lambda net, x: x + torch.func.grad(lambda z: (z**3).sum())(x),
    "autograd function": lambda net, x: Doubled.apply(x),
    "numpy": lambda net, x: x + torch.from_numpy(np.sin(x.detach().numpy())),
    "list": lambda net, x: x * torch.tensor(x.mean((1, 2, 3)).tolist()).view(-1, 1, 1, 1),
    "item": lambda net, x: x * x.mean().item(),
    "Python's random": lambda net, x: x * random.random(),
    "NumPy's random": lambda net, x: x * float(np.random.rand()),
    "a constant of the batch's size": lambda net, x: x * torch.arange(int(x.shape[0])).view(-1, 1, 1, 1),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_no_value_of_the_example_becomes_a_constant(name: str, rung: str) -> None:
    model = Net(OUTSIDE[name]).eval()
    graph = captured(model, rung)
    assert isinstance(graph, str) or same(model, graph)


def test_random_numbers_from_elsewhere_are_refused_as_such() -> None:
    text = captured(Net(OUTSIDE["NumPy's random"]).eval(), "auto")
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


# -- state -------------------------------------------------------------------------------------------------------------


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


class Whole(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x[:, :3]).softmax(1)


def test_a_part_is_compared_too() -> None:
    model = Whole(Net(lambda net, x: x * 2 if type(x) is Tensor else x)).eval()
    data = [(images()(4), torch.arange(4) % 3)] * 2
    with pytest.raises(CaptureError, match="Net cannot be captured"):
        fxprune.compress(model, data, 0.3, submodule="part", progress=False)


def test_a_model_without_numbers_is_not_run() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    assert len(list(fxprune.capture(model, tensors(6)(2)).graph.nodes)) == 5
