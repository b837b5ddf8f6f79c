"""Modules and tensors under any name: the graph has them under it, or says that it cannot."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import outputs
from torch import Tensor, nn

import fxprune

NAMES = (
    "class", "None", "match", "a b", "it's", 'say "x"', "two\nlines", "back\\slash", "a-b", "\u00e9", "\ufb01", "1",
    "__x", "{0}", "%s", "getattr", "torch", "x" * 200,
)  # fmt: skip
KEPT = ("self", "meta", "graph", "code", "recompile", "print_readable", "_graph", "_code")


class Named(nn.Module):
    """A layer, a parameter and a buffer of one name, each in a module of its own, behind a layer of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.parts, self.last = nn.Linear(3, 8), nn.ModuleDict({name: nn.Linear(8, 7)}), nn.Linear(7, 4)
        self.scale, self.shift, self.name = nn.Module(), nn.Module(), name
        self.scale.register_parameter(name, nn.Parameter(torch.randn(7)))
        self.shift.register_buffer(name, torch.randn(7))
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts[self.name](self._modules[self.name](self.first(x)).relu())
        return self.last(x * getattr(self.scale, self.name) + getattr(self.shift, self.name))


@pytest.mark.parametrize("method", ["fx", "values"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name(name: str, method: str) -> None:
    model, x = Named(name).eval(), torch.randn(4, 3)
    graph = fxprune.capture(model, x, method=method)
    plan = fxprune.Scores.random(graph, x).plan(alpha=0.5)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, torch.randn(3, 3)) < 1e-5
    assert small.state_dict().keys() == model.state_dict().keys()
    assert len(plan.keep[f"parts.{name}"]) < 7
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(outputs(again, x)[0], outputs(small, x)[0])


@pytest.mark.parametrize("name", KEPT)
def test_a_name_that_a_graph_keeps_for_itself(name: str) -> None:
    with pytest.raises(fxprune.CaptureError, match=rf"Named has a child called '{name}', a name that .*: rename it"):
        fxprune.capture(Named(name), torch.randn(2, 3))
