"""Layers as linear maps of windows, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.coupling.readers import Reader, as_matrix, from_matrix, reader_of, uses

LAYERS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 4, 2, 3, 2, padding_mode="circular"), (2, 4, 12)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (2, 4, 8, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, dilation=(1, 2), padding="same", padding_mode="reflect"), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate", bias=False), (2, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, 2), (2, 2, 4, 5, 4)),
    (nn.ConvTranspose1d(4, 6, 3, 2, 1), (2, 4, 6)),
    (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, dilation=(2, 1)), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, 1, 1), (1, 2, 3, 4, 3)),
]


def by_windows(reader: Reader, x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The layer's output from the values under its windows."""
    assert reader.windows is not None
    places = torch.arange(torch.Size(positions).numel())
    values = reader.windows.values(x, places, positions).unflatten(1, (reader.groups, -1))
    found = torch.einsum("goip,ngixp->ngox", reader.matrix(), values).flatten(1, 2)
    found = found if reader.bias is None else found + reader.bias[:, None]
    return found.unflatten(2, positions)


def only_reader(model: nn.Module) -> Reader | None:
    graph = fx.symbolic_trace(model)
    found = [reader_of(graph, node) for node in graph.graph.nodes]
    return next((reader for reader in found if reader is not None), None)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_windows_give_what_the_convolution_gives(layer: Any, shape: tuple[int, ...]) -> None:
    reader, x = only_reader(nn.Sequential(layer)), torch.randn(shape)
    assert reader is not None
    expected = layer(x)
    found = by_windows(reader, x, tuple(expected.shape[2:]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Functional(nn.Module):
    def __init__(self, shape: tuple[int, ...], bias: int, call: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.call = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(bias)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


FUNCTIONS = [
    ((6, 2, 3, 3), 6, lambda x, w, b: F.conv2d(x, w, b, 2, (1, 0), groups=2), (2, 4, 7, 7)),
    ((4, 3, 3), 3, lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, output_padding=1), (2, 4, 5)),
]


@pytest.mark.parametrize(("shape", "bias", "call", "inputs"), FUNCTIONS, ids=["conv2d", "conv_transpose1d"])
def test_functions_on_parameters_are_layers(shape: Any, bias: int, call: Any, inputs: Any) -> None:
    model, x = Functional(shape, bias, call), torch.randn(inputs)
    reader = only_reader(model)
    assert reader is not None
    assert reader.bias is model.bias
    expected = model(x)
    torch.testing.assert_close(by_windows(reader, x, tuple(expected.shape[2:])), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: F.linear(x, w, b * 2),  # a bias that is computed
        lambda x, w, b: F.linear(x, w * 2, b),
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
    ],
)
def test_what_is_computed_is_no_layer(call: Any) -> None:
    assert only_reader(Functional((3, 3), 3, call)) is None


def test_asymmetric_padding_is_no_layer() -> None:
    assert only_reader(nn.Sequential(nn.Conv2d(3, 3, 2, padding="same"))) is None


@pytest.mark.parametrize(("shape", "groups", "transposed"), [((6, 2, 3), 3, False), ((6, 4, 3, 2), 3, True)])
def test_a_matrix_becomes_its_weight_again(shape: tuple[int, ...], groups: int, *, transposed: bool) -> None:
    weight = torch.randn(shape)
    matrix = as_matrix(weight, groups, transposed=transposed)
    assert torch.equal(from_matrix(matrix, shape, transposed=transposed), weight)


def test_products_are_those_of_what_stands_on_each_channel() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    reader = Reader(layer.weight, None, 2, None, layer)
    columns = torch.zeros(6 * 9, 4, dtype=torch.float64)  # each group has rows of its own
    for group, part in enumerate(layer.weight.detach().double().split(3)):
        columns[27 * group : 27 * (group + 1), 2 * group : 2 * (group + 1)] = part.movedim(1, -1).reshape(27, 2)
    torch.testing.assert_close(torch.from_numpy(reader.products()), columns.T @ columns)
    torch.testing.assert_close(torch.from_numpy(reader.squares()), columns.square().sum(0), rtol=1e-5, atol=0)


def test_uses_count_calls_and_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.alias = self.b

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.b(self.a(self.a(x))), self.b.weight)

    model = Twice()
    graph = fx.symbolic_trace(model)
    counts = uses(graph)
    assert counts[id(graph.a.weight)] == 2
    assert counts[id(graph.b.weight)] == 2
    assert counts[id(graph.b.bias)] == 1
