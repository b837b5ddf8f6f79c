"""Inputs whose first axes are not one batch (a graph and its edges, images and their boxes), through all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, outputs
from nets import layers
from torch import Tensor, nn

import fxprune
from fxprune.tracing.graph import example_of


class Nodes(nn.Module):
    """Two layers on a graph of nodes, whose edges are (2, edges) numbers of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        first, second = (nn.functional.one_hot(ends, x.shape[0]).to(x) for ends in edges)
        adjacent = second.T @ first
        return self.head((adjacent @ self.b((adjacent @ self.a(x)).relu())).relu())

    @staticmethod
    def batch(count: int, others: int) -> tuple[Any, Tensor]:
        return (torch.randn(count, 6), torch.randint(0, count, (2, others))), torch.arange(count) % 3


class Boxes(nn.Module):
    """Features of images for boxes, whose first number is that of their image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.Linear(14, 3)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        features = self.b(self.a(x).relu()).relu().mean((2, 3))
        return self.head(torch.cat([features[boxes[:, 0].long()], boxes[:, 1:]], 1))

    @staticmethod
    def batch(count: int, others: int) -> tuple[Any, Tensor]:
        numbers = torch.arange(others).flip(0) % count
        return (torch.randn(count, 3, 6, 6), torch.cat([numbers[:, None], torch.rand(others, 4)], 1)), numbers % 3


@pytest.mark.parametrize("kind", [Nodes, Boxes])
def test_every_stage_runs_on_an_example_that_holds_together(kind: Any, tmp_path: Path) -> None:
    model, batches = kind().eval(), [kind.batch(8, 11) for _ in range(2)]
    example, other = batches[0][0], kind.batch(3, 5)[0]
    small = fxprune.compress(model, batches, 0.8, progress=False)
    error = fxprune.report(small).error
    assert error is not None
    assert error < 1e-5
    scores = fxprune.score(model, batches, progress=False)
    scores.plan(0.8).save(tmp_path / "plan.json")
    plan = fxprune.Plan.load(tmp_path / "plan.json")
    assert [entry["tensor"] for entry in plan.example] == [list(tensor.shape) for tensor in example]
    plain, own = fxprune.apply(model, plan), fxprune.narrow(model, plan)
    assert plain.b.weight.shape[0] < model.b.weight.shape[0]
    for inputs in (example, other):
        assert fxprune.verify(model, plan, plain, inputs) < 1e-5
        assert difference(outputs(own, inputs), outputs(plain, inputs)) < 1e-6
    small = fxprune.apply(model, plan, scores=scores, loader=batches, compensate="sequential")
    fxprune.save(small, tmp_path / "small.safetensors")
    again = fxprune.load(tmp_path / "small.safetensors", model)
    assert difference(outputs(again, other), outputs(small, other)) == 0


@layers(lambda: dict(a=nn.Linear(4, 6), b=nn.Linear(6, 2)))
def Pairs(self, x: Tensor, pairs: Tensor) -> Tensor:
    """A layer, and a row for every pair of rows, (pairs, 2)."""
    h = self.a(x).relu()
    return self.b(h[pairs[:, 0]] + h[pairs[:, 1]])


@pytest.mark.parametrize(("largest", "rows"), [(5, 6), (1, 2)])
def test_the_example_is_cut_where_the_model_runs_on_the_cut(largest: int, rows: int) -> None:
    pairs = torch.full((6, 2), largest)  # as many as there are rows
    for prove in (True, False):
        graph = fxprune.capture(Pairs(), (torch.randn(6, 4), pairs), prove=prove)
        assert [len(tensor) for tensor in example_of(graph)] == [rows, rows]


@layers(lambda: dict(bags=nn.EmbeddingBag(9, 4), a=nn.Linear(4, 8), b=nn.Linear(8, 3)))
def Bags(self, words: Tensor, begins: Tensor) -> Tensor:
    """A sum of embeddings for every bag, of which the first has to begin at 0."""
    return self.b(self.a(self.bags(words, begins)).relu())


class Entries(dict[str, Any]):
    """Its entries are attributes, too."""

    __getattr__ = dict.__getitem__


def test_entries_of_a_dict_that_are_read_as_attributes() -> None:
    """Torch does not look into dicts of other classes; a plain one is taken."""

    class Net(nn.Module):
        def __init__(self, *, plain: bool) -> None:
            super().__init__()
            self.a, self.b, self.plain = nn.Linear(6, 8), nn.Linear(8, 3), plain

        def forward(self, batch: Any) -> Tensor:
            return self.b(self.a(batch["pics"]["x"] if self.plain else batch.pics.x).relu())

    x, y = torch.randn(6, 6), torch.arange(6) % 3
    nested = ((Entries(pics=Entries(x=x)),), y)
    with pytest.raises(
        fxprune.UnsupportedOpError,
        match=r"line \d+, in forward \(TypeError: a dict of a class of its own gives its entry 'pics' as an attribute, "
        r"and torch looks into plain dicts only: read it as value\['pics'\], and give a plain dict",
    ):
        fxprune.compress(Net(plain=False), [nested], progress=False)
    small = fxprune.compress(Net(plain=True), [(({"pics": {"x": x}},), y)], 0.5, progress=False)
    assert small({"pics": {"x": x}}).shape == (6, 3)


def test_an_example_that_was_made_of_a_plan_need_not_be_one_that_the_model_takes() -> None:
    model, example = Bags().eval(), (torch.tensor([0, 8, 3, 5, 5]), torch.tensor([0, 2]))
    plan = fxprune.Scores.random(model, example).plan(0.9)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, example) < 1e-5
    with pytest.raises(
        fxprune.CaptureError, match=r"does not run on the example \(RuntimeError: offsets\[0\] has to be 0"
    ):
        fxprune.capture(model, (example[0], example[1] + 1))
