"""Capture: a copy of the model as a graph, that keeps its names and leaves it alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs
from nets import layers
from torch import Tensor, nn
from zoo import ZOO, images, tensors

import fxprune
from fxprune.errors import CaptureError
from fxprune.tracing.graph import flops_of


@pytest.mark.parametrize("name", ["residual", "attention_permute_einsum", "packed_gru_outputs_samples_first"])
def test_a_pickled_graph_goes_through_all_later_stages(name: str) -> None:
    case = ZOO[name]
    graph = fxprune.capture(case.build(), case.example(2))
    twin = pickle.loads(pickle.dumps(graph))
    assert list(map(str, fxprune.couple(twin))) == list(map(str, fxprune.couple(graph)))
    plan = fxprune.Scores.random(twin, case.example(2)).plan(macs=0.7)
    small = fxprune.apply(twin, plan)
    assert fxprune.verify(graph, plan, small, case.example(3)) < 1e-4
    assert fxprune.report(small).macs_before == fxprune.report(fxprune.apply(graph, plan)).macs_before


def test_the_example_is_left_alone_by_a_model_that_changes_its_input() -> None:
    example = images()(2)
    fxprune.capture(ZOO["changes_its_input"].build(), example)
    assert torch.equal(example, images()(2))


def test_a_captured_graph_is_returned_as_it_is() -> None:
    graph = fxprune.capture(ZOO["mlp"].build(), tensors(6)(2))
    assert fxprune.capture(graph, tensors(6)(3)) is graph


def test_modes_of_submodules_are_kept() -> None:
    model = ZOO["residual"].build().train()
    model.norm.eval()
    graph = fxprune.capture(model, images()(2))
    assert graph.training
    assert not graph.norm.training
    assert graph.stem.training


def test_functional_dropout_follows_the_mode() -> None:
    """Its flag is read when the model runs, not when it is traced."""
    for start in (True, False):
        graph = fxprune.capture(ZOO["dropout_functions"].build().train(start), images()(2))
        graph.eval()
        assert torch.equal(graph(images()(2)), graph(images()(2)))
        graph.train()
        assert not torch.equal(graph(images()(2)), graph(images()(2)))


def test_a_model_in_training_mode_is_captured_in_eval_mode() -> None:
    """BatchNorm would refuse one value a channel, and would move its statistics."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fxprune.capture(model, torch.randn(1, 3))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@layers(lambda: dict(first=nn.Linear(6, 8), second=nn.Linear(4, 5)))
def AsksForGradients(self, x: Tensor) -> Tensor:
    """A forward that asks for gradients of a value on the way, as those do that checkpoint what follows."""
    return self.second(self.first(x).requires_grad_().view(-1, 2, 4)).sum(1)


@pytest.mark.parametrize("method", ["fx", "values"])
def test_a_view_of_a_value_that_needs_gradients(method: str) -> None:
    model, x = AsksForGradients(), tensors(6)(2)
    graph = fxprune.capture(model, x, method=method)
    assert difference(outputs(model, x), outputs(graph, x)) == 0
    flops = flops_of(graph)
    assert sum(flops.values()) == 2 * (2 * 6 * 8 + 2 * 2 * 4 * 5)
    assert all(parameter.requires_grad for parameter in graph.parameters())


# -- what cannot be captured -------------------------------------------------------------------------------------------


@layers(lambda: dict(a=nn.Linear(6, 4)))
def BranchOnValue(self, x: Tensor) -> Tensor:
    x = self.a(x)
    if x.sum() > 0:
        x = x * 2
    return x


@layers(lambda: dict(a=nn.Linear(6, 4)))
def CannotBeCopied(self, x: Tensor) -> Tensor:
    self.seen = self.a(x)
    return F.relu(self.seen)


def refused(model: nn.Module, example: Any, message: str, **options: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(CaptureError, match=message):
        fxprune.capture(model, example, **options)


def test_control_flow_on_values_names_the_line() -> None:
    refused(
        BranchOnValue(),
        tensors(6)(2),
        r"(?s)BranchOnValue cannot be captured:\n  fx: .*capture.py:\d+: if x.sum\(\) > 0.*register a rule",
        method="fx",
    )


def test_a_model_that_cannot_be_copied() -> None:
    model = CannotBeCopied()
    model(tensors(6)(2))
    refused(model, tensors(6)(2), "CannotBeCopied cannot be deep-copied .*: remove what cannot be copied")


@pytest.mark.parametrize("example", [(torch.zeros(2, 6), torch.zeros(2, 6)), {"y": torch.zeros(2, 6)}, ()])
def test_an_example_that_does_not_fit_the_forward(example: Any) -> None:
    refused(BranchOnValue(), example, r"the example does not fit BranchOnValue.forward\(.*: .*Give a tensor, a tuple")


def test_an_example_that_a_plan_could_not_describe() -> None:
    class Flagged(nn.Module):
        def forward(self, x: Tensor, flag: object) -> Tensor:
            return x + 1

    refused(Flagged(), (torch.zeros(2, 6), object()), "the example holds an object, which a plan cannot describe")


@pytest.mark.parametrize("name", ["graph", "code"])
def test_a_child_with_a_name_of_graph_module(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules[name](x)

    refused(
        Net(),
        tensors(6)(2),
        f"Net has a child called '{name}', a name that torch.fx.GraphModule keeps: rename it, or wrap",
    )


def test_arguments_that_were_left_out_keep_their_names() -> None:
    @layers(lambda: dict(layer=nn.Linear(4, 3)))
    def Scaled(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, flag: bool = True) -> Tensor:
        return self.layer(x) * scale if mask is None and flag else x

    graph, x = fxprune.capture(Scaled(), torch.ones(2, 4)), torch.ones(3, 4)
    assert torch.equal(graph(x, None, scale=2.0, flag=True), graph(x))
    assert torch.equal(graph(x=x, mask=None), graph(x))
    with pytest.raises(CaptureError, match="the graph was made for mask=None"):
        graph(x, mask=x)


def test_plain_attributes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.num_classes, model.sizes, model.callback, model.training = 3, [1, 2], print, False
    graph = fxprune.capture(model, torch.ones(2, 4))
    for copied in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert (copied.num_classes, copied.sizes) == (3, [1, 2])
        assert "callback" not in vars(copied)
    assert graph.sizes is not model.sizes


def test_an_example_without_samples() -> None:
    with pytest.raises(CaptureError, match=r"has no samples, its first tensor is \(0, 4\): give one at least"):
        fxprune.capture(nn.Linear(4, 3), torch.zeros(0, 4))


def test_a_record_is_read_by_attribute_or_by_name() -> None:
    record = fxprune.capture(nn.Linear(4, 2), torch.zeros(2, 4)).meta["fxprune"]
    assert record["method"] == record.method == "fx"
    with pytest.raises(KeyError, match="unknown"):
        record["unknown"]
