"""Examples: cut to a few samples, described by a plan, and another batch made of one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.caller.example import LONGEST_ROW, check_example, from_json, to_json, trim
from fxprune.caller.other_batches import in_other_layouts, resized, varied_batch
from fxprune.errors import FxpruneError


@dataclass
class Held:
    """An input of the user's own class."""

    x: Tensor


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_have_other_values_of_the_same_range(samples: int, length: int, dtype: torch.dtype) -> None:
    x = torch.randn(length, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    y = varied_batch(x, samples)
    assert y.shape == (samples, 3, 4)
    assert y.dtype == dtype
    assert not any(torch.equal(row, old) for row in y for old in x)
    assert y.abs().max() <= x.abs().max()
    assert len(y.unique(dim=0)) == samples
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([True, False]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.0, float("-inf")], [0.0, 0.0]]),
        torch.tensor([1 + 2j, 0.5j]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
    ],
)
def test_whole_numbers_are_taken_again_as_they_are(x: Tensor) -> None:
    assert torch.equal(varied_batch(x, 3), x[[1, 0, 1]])


def test_a_longer_example_has_other_and_larger_entries() -> None:
    ids, x = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    longer = resized({"ids": ids, "x": x, "n": 3}, [(0, 1), (1, 1)], 5)
    assert torch.equal(longer["ids"], torch.tensor([[1, 2, 3, 4, 3], [3, 4, 1, 2, 1]]))
    assert torch.equal(longer["x"], torch.tensor([[0.5, 1.5, 10.0, 14.0, 10.0], [2.5, 3.5, 2.0, 6.0, 2.0]]))
    assert longer["n"] == 3
    shorter = resized((ids, x), [(1, 0)], 1)
    assert torch.equal(shorter[0], ids)
    assert torch.equal(shorter[1], x[:1])


def test_other_layouts_have_the_same_values() -> None:
    x = torch.randn(2, 3, 4, 5)
    turned, by_channels = (batch for batch, _ in in_other_layouts((x, x[0, 0, 0])))
    assert torch.equal(turned, x)
    assert torch.equal(by_channels, x)
    assert turned.stride()[0] == 1
    assert by_channels.is_contiguous(memory_format=torch.channels_last)


def test_a_blank_example_is_drawn_anew() -> None:
    for blank in (torch.zeros(4, 3), torch.ones(4, 3)):
        assert varied_batch({"x": blank, "mask": torch.ones(4, 3)}, 5)["x"].unique().numel() == 15
    assert torch.equal(varied_batch({"x": torch.randn(4, 3), "mask": torch.ones(4, 3)}, 5)["mask"], torch.ones(5, 3))


def test_what_is_not_of_the_length_of_the_batch_is_kept() -> None:
    x = torch.randn(4, 2)
    packed = pack_sequence([torch.randn(4, 2)])
    given = {
        "x": x,
        "edges": torch.tensor([[0, 1, 3], [2, 2, 1]]),
        "t": torch.tensor(0.5),
        "nested": (Held(x), [packed, None, "text", 4, torch.eye(4).to_sparse()]),
        "meta": torch.zeros(4, 1, device="meta"),
    }
    made = varied_batch(given, 5)
    assert list(made) == list(given)
    assert made["x"].shape == (5, 2)
    assert made["meta"].shape == (5, 1)
    assert all(made[name] is given[name] for name in ("edges", "t"))
    assert all(a is b for a, b in zip(made["nested"][1], given["nested"][1], strict=True))
    assert made["nested"][0] is given["nested"][0]


@pytest.mark.parametrize("nothing", [(), (3, None), torch.zeros(0, 4), torch.tensor(1.5)])
def test_without_samples_it_stays_as_it_is(nothing: object) -> None:
    made = varied_batch(nothing, 3)
    assert made is nothing or made == nothing


def test_gradients_are_asked_for_as_before() -> None:
    assert varied_batch(torch.randn(2, 3, requires_grad=True), 3).is_leaf
    assert varied_batch(torch.randn(2, 3, requires_grad=True), 3).requires_grad
    with torch.inference_mode():
        x = torch.randn(2, 3)
    assert not varied_batch(x, 3).requires_grad


def test_fewer_samples_are_no_batch_where_others_number_them() -> None:
    edges = torch.tensor([[0, 1, 3], [2, 2, 1]])
    assert varied_batch((torch.randn(4, 2), edges), 3)[0].shape == (4, 2)
    assert varied_batch((torch.randn(4, 2), edges), 5)[0].shape == (5, 2)


@pytest.mark.parametrize(
    ("beside", "rows"),
    [
        (torch.zeros(6, 3), 2),
        (torch.ones(6), 2),
        (torch.eye(5), 2),
        (torch.tensor(7.0), 2),
        (torch.ones(2, 9, dtype=torch.bool), 2),
        (torch.tensor([[0, 5], [1, 2]]), 6),
        (torch.tensor([[5.0, 0.1, 0.2]]), 6),
        (pack_sequence([torch.zeros(3, 2)] * 2), 6),
    ],
)
def test_only_what_has_the_length_of_the_batch_is_cut(beside: Any, rows: int) -> None:
    x = torch.randn(6, 4)
    for cut, other in (trim((x, beside), samples=2), trim({"x": x, "y": beside}, samples=2).values()):
        assert torch.equal(cut, x[:rows])
        if isinstance(beside, Tensor):
            kept = beside[:rows] if beside.ndim and len(beside) == 6 else beside
            assert torch.equal(other, kept)
        else:
            assert other is beside


def test_a_plan_keeps_a_row_of_floats_that_are_no_samples() -> None:
    boxes = torch.tensor([[1.0, 0.5, -float("inf")], [0.0, 0.25, 2.0]])
    example = torch.randn(3, 4), boxes, torch.tensor(0.5, dtype=torch.bfloat16), torch.randn(5, LONGEST_ROW + 1)
    described = json.loads(json.dumps(to_json(example)))
    check_example(described)
    assert [entry.get("row") for entry in described] == [None, boxes[0].tolist(), [0.5], None]
    made = from_json(described)
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in example]
    assert torch.equal(made[1], boxes[[0, 0]])
    assert made[1].is_contiguous()
    assert made[2] == 0.5


@pytest.mark.parametrize("row", [[1.0], "row", [1.0, "a"], [True, False], {"0": 1.0}])
def test_a_row_that_does_not_fit(row: Any) -> None:
    with pytest.raises(ValueError, match=r"names a row of a tensor of shape \[3, 2\] that is not 2 numbers"):
        check_example({"tensor": [3, 2], "dtype": "float32", "row": row})


SMALL = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
LOADER = [(torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]))] * 3


@pytest.mark.parametrize(("example", "message"), [
    (LOADER, r"too many positional arguments\. .*; it looks like a loader, a list of batches: give the inputs of one"),
    (LOADER[:1], r"does not run on the example .*; it looks like a loader, a list of batches: give the inputs of one"),
    (DataLoader(TensorDataset(*LOADER[0])), r"the example is a DataLoader: give the inputs of one batch, next\(iter"),
    (torch.ones(5, 3), r"does not run .*\), which holds \(5, 3\) float32: give one batch as its forward takes it$"),
    (torch.ones(5, 4).byte(), r"which holds \(5, 4\) uint8: give one .*; of images as bytes, x\.float\(\) / 255$"),
    (torch.ones(2, 9, 9, 3), r"does not run .*; of images whose channels come last, x\.permute\(0, 3, 1, 2\)$"),
    (torch.ones(5, 4).double(), r"does not run .*; of the weights' dtype, x\.to\(torch\.float32\), say$"),
    (LOADER[0][0].numpy(), r"the inputs are arrays of NumPy: make tensors of them, torch\.as_tensor\(x\)$"),
])  # fmt: skip
def test_what_is_no_example(example: Any, message: str) -> None:
    """A loader or an array, to any function that takes an example."""
    plan = fxprune.Scores.random(SMALL, LOADER[0][0]).plan(alpha=0.5)
    for call in (
        lambda: fxprune.Plan.from_kept(SMALL, example, {"0": [0]}),
        lambda: fxprune.verify(SMALL, plan, fxprune.apply(SMALL, plan), example),
    ):
        with pytest.raises(FxpruneError, match=message):
            call()


def test_batches_of_arrays() -> None:
    with pytest.raises(FxpruneError, match="the inputs are arrays of NumPy: make tensors of them"):
        fxprune.compress(SMALL, [(LOADER[0][0].numpy(), LOADER[0][1])], macs=0.5, progress=False)
