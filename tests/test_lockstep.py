"""Stepping through a graph over all batches."""

from __future__ import annotations

import weakref

import torch
from helpers import outputs, tensors_of
from torch import Tensor, fx, nn
from zoo import ZOO

import fxprune
from fxprune.scoring.lockstep import Stepper, live_bytes


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(2)
        x.add_(y)
        return torch.relu_(x) + y


def finished(graph: fx.GraphModule, batches: list[list[Tensor]]) -> tuple[Stepper, list[object]]:
    """A stepper after the last node, and the outputs."""
    steps = Stepper(graph, batches)
    with torch.no_grad():
        for node in steps.nodes[:-1]:
            steps.to(node)
            steps.passed(node)
        return steps, steps.to(steps.nodes[-1])


def test_values_are_those_of_a_plain_run() -> None:
    for name in ("residual", "squeeze_excite", "multihead_plain", "lstm"):
        if name not in ZOO:
            continue
        case = ZOO[name]
        graph = fxprune.capture(case.build().eval(), case.example(2))
        batches = [case.example(2), case.example(3)]
        _, found = finished(graph, [[x] for x in batches])
        for batch, output in zip(batches, found, strict=True):
            assert all(map(torch.equal, tensors_of(output), outputs(graph, batch)))


def test_operations_in_place_leave_the_inputs() -> None:
    graph = fx.symbolic_trace(InPlace())
    x = torch.randn(2, 3)
    before = x.clone()
    _, found = finished(graph, [[x]])
    assert torch.equal(x, before)
    assert torch.equal(found[0], InPlace()(before.clone()))


def test_only_the_outputs_are_alive_at_the_end() -> None:
    case = ZOO["residual"]
    graph = fxprune.capture(case.build().eval(), case.example(2))
    steps = Stepper(graph, [[case.example(2)]])
    seen = []
    with torch.no_grad():
        for node in steps.nodes:
            seen.append(weakref.ref(steps.to(node)[0]))
            steps.passed(node)
    assert not steps.values
    assert not any(ref() is not None for ref in seen)
    steps, _ = finished(graph, [[case.example(2)]])
    assert set(steps.values) == {steps.nodes[-1]}


def test_live_bytes_are_those_of_the_widest_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = fxprune.capture(model, torch.zeros(2, 4))
    assert live_bytes(graph) == 2 * (8 + 8) * 4
