"""Layers with weights as linear maps of windows: one description of every layer that reads channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxprune.caller.tensors import attribute_at
from fxprune.coupling.groups import Edge
from fxprune.rules.experts import expert_linear
from fxprune.rules.table import key_of

Pads = tuple[int, ...]
_ROWS = 64  # outputs of a weight that are squared at once


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A layer that computes W x + b, where x are the values under its window.

    `windows` is None for a linear layer, whose channels lie along the last axis. `owner` is the module that holds the
    weight, or None where the graph passes the weight to a function.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    windows: Windows | None = None
    owner: nn.Module | None = None

    @property
    def channel_axis(self) -> int:
        """The axis of the channels of inputs and outputs, from the end."""
        return -1 if self.windows is None else -1 - self.windows.nd

    def matrix(self) -> Tensor:
        """The weight as (groups, outputs a group, inputs a group, places of the window)."""
        return as_matrix(self.weight, self.groups, transposed=self.windows is not None and self.windows.transposed)

    def products(self, precision: torch.dtype = torch.float64) -> NDArray[Any]:
        """The inner products of the weights on two input channels: (channels, channels), zero between groups."""
        columns = self.matrix().to(precision).transpose(1, 2).flatten(2)
        blocks: Tensor = torch.block_diag(*(columns @ columns.transpose(1, 2)))
        return blocks.cpu().numpy()

    def squares(self) -> NDArray[np.float64]:
        """The squared norm of the weights on each input channel: (channels,)."""
        parts = self.matrix().split(_ROWS, dim=1)  # in double precision a few at a time: some weights are large
        total: Tensor = sum((part.double().square().sum((1, 3)) for part in parts), torch.zeros(()))
        return total.flatten().cpu().numpy()

    def write(self, matrix: Tensor) -> None:
        """Write a matrix of the shape of `matrix()` into the weight."""
        transposed = self.windows is not None and self.windows.transposed
        self.weight.data.copy_(from_matrix(matrix, tuple(self.weight.shape), transposed=transposed))


def as_matrix(weight: Tensor, groups: int, *, transposed: bool) -> Tensor:
    """A weight as (groups, outputs a group, inputs a group, places of the window).

    >>> as_matrix(torch.zeros(6, 2, 3, 3), 3, transposed=False).shape
    torch.Size([3, 2, 2, 9])
    >>> as_matrix(torch.zeros(6, 4, 3, 3), 3, transposed=True).shape
    torch.Size([3, 4, 2, 9])
    """
    flat = weight.detach().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return flat.transpose(1, 2).flip(-1) if transposed else flat


def from_matrix(matrix: Tensor, shape: Sequence[int], *, transposed: bool) -> Tensor:
    """A weight of the given shape from its matrix: the inverse of `as_matrix`."""
    return (matrix.flip(-1).transpose(1, 2) if transposed else matrix).reshape(tuple(shape))


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a convolution lie. A transposed one is a plain one over its input, spread out with zeros."""

    nd: int
    size: Pads
    stride: Pads
    padding: Pads
    dilation: Pads
    transposed: bool = False
    mode: str = "constant"

    def values(self, x: Tensor, places: Tensor, positions: Sequence[int]) -> Tensor:
        """The input values under the windows of some output positions.

        Args:
            x: inputs, (samples, channels, *positions).
            places: (n,) flat indices into the grid of output positions.
            positions: the size of that grid.

        Returns:
            (samples, channels, n, places of the window).
        """
        padded = self._padded(x, positions)
        sizes = padded.shape[-self.nd :]
        steps = (1,) * self.nd if self.transposed else self.stride
        starts, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for axis, index in enumerate(_unraveled(places.cpu(), positions)):
            starts = starts * sizes[axis] + index * steps[axis]
            taps = torch.arange(self.size[axis]) * self.dilation[axis]
            offsets = (offsets[:, None] * sizes[axis] + taps).reshape(-1)
        index = (starts[:, None] + offsets).to(x.device)
        return padded.flatten(-self.nd)[:, :, index]

    def _padded(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """The input, padded so that every window lies within it."""
        if not self.transposed:
            pads = [pad for low in reversed(self.padding) for pad in (low, low)]
            return F.pad(x, pads, self.mode) if any(pads) else x
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[-self.nd :], self.stride, strict=True)]
        spread = x.new_zeros([*x.shape[: -self.nd], *sizes])
        between: Any = (..., *(slice(None, None, s) for s in self.stride))
        spread[between] = x
        pads = []
        for axis in reversed(range(self.nd)):
            reach = self.dilation[axis] * (self.size[axis] - 1)
            low = reach - self.padding[axis]
            pads += [low, positions[axis] + reach - low - spread.shape[axis - self.nd]]
        return F.pad(spread, pads)


def _unraveled(places: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Flat indices as one index along each axis."""
    found = []
    for size in reversed(sizes):
        found.append(places % size)
        places = places // size
    return found[::-1]


def readers_on(graph: fx.GraphModule, edge: Edge) -> list[Reader]:
    """The layers that read the channels of an edge; a recurrent layer counts as one for each of its matrices."""
    node = next((node for node in graph.graph.nodes if node.name == edge.consumer), None)
    if node is None:
        return []
    module: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return [
            Reader(module.get_parameter(name), module._parameters.get(name.replace("weight", "bias")))
            for name in _recurrent(module, edge)
        ]
    found = reader_of(graph, node)
    fits = found is not None and found.matrix().shape[0] * found.matrix().shape[2] == len(edge.units)
    return [found] if found is not None and fits else []


def _recurrent(module: nn.Module, edge: Edge) -> list[str]:
    """The weights of a recurrent module that read an edge: those of a cell, or of a layer in each direction."""
    name = edge.parameter or ("weight_ih" if isinstance(module, nn.RNNCellBase) else "weight_ih_l0")
    names = [name, f"{name}_reverse"] if "_ih" in name else [name]
    return [
        n
        for n in names
        if n in module._parameters and "_hr_" not in n and module.get_parameter(n).shape[1] == len(edge.units)
    ]


def experts_on(graph: fx.GraphModule, edge: Edge) -> list[Reader]:
    """The experts that read the channels of an edge, with all of their weights as one layer."""
    node = next((node for node in graph.graph.nodes if node.name == edge.consumer), None)
    weight = _parameter(graph, node.args[2]) if node is not None and node.target is expert_linear else None
    if weight is None:
        return []
    matrices = weight.transpose(1, 2) if node.kwargs.get("transposed") else weight  # type: ignore[union-attr]
    return [Reader(matrices.flatten(0, 1), None)]


Make = Callable[[Any, fx.Node], Reader | None]
MODULES: dict[type[nn.Module], Make] = {}
FUNCTIONS: dict[Any, Callable[..., Reader | None]] = {}


def reader_of(graph: fx.GraphModule, node: fx.Node) -> Reader | None:
    """The layer that a node calls, or None where it is no linear map of windows or its weight is computed."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        make = next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)
        return make(module, node) if make and isinstance(module._parameters.get("weight"), nn.Parameter) else None
    function = FUNCTIONS.get(key_of(node, graph)) if node.op == "call_function" else None
    return function(graph, *node.args, **node.kwargs) if function else None


def _linear_module(module: Any, node: fx.Node) -> Reader:
    return Reader(module.weight, module.bias, owner=module)


def _convolution_module(module: Any, node: fx.Node) -> Reader | None:
    nd, transposed = len(module.kernel_size), isinstance(module, nn.modules.conv._ConvTransposeNd)
    reach = module._reversed_padding_repeated_twice[::-1]
    if (
        any(low != high for low, high in zip(reach[::2], reach[1::2], strict=True))
        or len(node.args) + len(node.kwargs) > 1
    ):
        return None  # "same" padding of an even window; an output size that is given in the call
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = Windows(nd, module.kernel_size, module.stride, tuple(reach[::2]), module.dilation, transposed, mode)
    return Reader(module.weight, module.bias, module.groups, windows, module)


MODULES[nn.Linear] = _linear_module
MODULES[nn.modules.conv._ConvNd] = _convolution_module


def _linear_function(graph: fx.GraphModule, input: Any, weight: Any, bias: Any = None) -> Reader | None:  # noqa: A002
    found = _held(graph, weight, bias)
    return None if found is None else Reader(*found)


def _convolution_function(
    graph: fx.GraphModule, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,  # noqa: A002
    dilation: Any = 1, groups: Any = 1, *, nd: int,
) -> Reader | None:  # fmt: skip
    found, sizes = _held(graph, weight, bias), [_each(value, nd) for value in (stride, padding, dilation)]
    if found is None or not isinstance(groups, int) or None in sizes:
        return None
    stride, padding, dilation = sizes
    return Reader(*found, groups, Windows(nd, tuple(found[0].shape[2:]), stride, padding, dilation))


def _transposed_function(
    graph: fx.GraphModule, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,  # noqa: A002
    output_padding: Any = 0, groups: Any = 1, dilation: Any = 1, *, nd: int,
) -> Reader | None:  # fmt: skip
    plain = _convolution_function(graph, input, weight, bias, stride, padding, dilation, groups, nd=nd)
    return plain and replace(plain, windows=plain.windows and replace(plain.windows, transposed=True))


FUNCTIONS[F.linear] = _linear_function
for _nd in (1, 2, 3):
    FUNCTIONS[getattr(F, f"conv{_nd}d")] = partial(_convolution_function, nd=_nd)
    FUNCTIONS[getattr(F, f"conv_transpose{_nd}d")] = partial(_transposed_function, nd=_nd)


def _each(value: Any, nd: int) -> Pads | None:
    """One number for each axis."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(size, int) for size in sizes):
        return None
    return sizes * nd if len(sizes) == 1 else sizes


def _held(graph: fx.GraphModule, weight: Any, bias: Any) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """The weight and bias that a function is called with, or None where one of them is computed."""
    found, added = _parameter(graph, weight), _parameter(graph, bias)
    return None if found is None or (added is None and bias is not None) else (found, added)


def _parameter(graph: fx.GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter behind an argument, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = attribute_at(graph, str(node.target))
    return found if isinstance(found, nn.Parameter) else None


def uses(graph: fx.GraphModule) -> Counter[int]:
    """How often a graph reads each of its parameters and buffers, by their ids."""
    found: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            found.update(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
        elif node.op == "get_attr":
            found[id(attribute_at(graph, str(node.target)))] += len(node.users)
    return found
