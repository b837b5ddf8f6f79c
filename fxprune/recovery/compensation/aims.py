"""The values that a layer of the rewritten graph is fitted to: the original's, at the node that serves best."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.coupling.readers import Reader, uses
from fxprune.tracing.in_place import works_in_place

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """A layer's output is fitted to the value of `node`, which may lie behind a BatchNorm and an addition.

    `norm` is the BatchNorm that follows the layer; where `node` lies `behind` it, the norm scales and shifts the
    layer's output. `other` is the other summand, whose values are known. `rectified` says that only rectifiers read
    the value.
    """

    node: fx.Node
    norm: nn.Module | None
    behind: bool = False
    other: fx.Node | None = None
    rectified: bool = False

    def scale_and_shift(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the shift of the layer's outputs on the way to the node: both (1, channels)."""
        if not self.behind or self.norm is None:
            return torch.ones_like(like[:1]), torch.zeros_like(like[:1])
        norm: Any = self.norm  # a BatchNorm in eval mode
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias.detach()
        return scale.to(like)[None], shift.to(like)[None]


def aim_of(
    graph: fx.GraphModule, layer: fx.Node, reader: Reader, known: Container[fx.Node], specs: Mapping[str, Any]
) -> Aim:
    """The aim of the node `layer`: the sum that its output is added to, if the other summand is `known`.

    At the sum the layer corrects errors of the other summand, too: in a residual network each block compensates the
    errors of the blocks before it. By the `specs` of nodes, the aim has the shape of the layer's output.
    """
    norm, end = norm_after(graph, layer, reader, specs)
    user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and _is_sum(user) and _shape(specs, user) == _shape(specs, layer) is not None:
        (other,) = (source for source in user.all_input_nodes if source is not end)
        if other in known and not _is_written(graph, other, user):
            return Aim(user, norm, behind=True, other=other, rectified=_is_rectified(graph, user))
    if end.name in specs and _is_rectified(graph, end):
        return Aim(end, norm, behind=True, rectified=True)
    return Aim(layer, norm)


def norm_after(
    graph: fx.GraphModule, layer: fx.Node, reader: Reader, specs: Mapping[str, Any]
) -> tuple[nn.Module | None, fx.Node]:
    """The BatchNorm that follows this layer and no other, and the last node before anything else follows."""
    norm, end = None, layer
    while len(end.users) == 1:
        (user,) = end.users
        module = called(graph, user)
        if norm is None and isinstance(module, _BATCH_NORMS) and _is_own(graph, module, reader, _shape(specs, layer)):
            norm = module
        elif not isinstance(module, _THROUGH):
            break
        end = user
    return norm, end


def _is_own(graph: fx.GraphModule, norm: Any, reader: Reader, shape: tuple[int, ...] | None) -> bool:
    """Whether a BatchNorm has statistics that nothing else uses, over the output channels of the layer."""
    if norm.running_mean is None or uses(graph)[id(norm.running_mean)] > 1:
        return False
    return shape is not None and len(shape) + reader.channel_axis == 1


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values, entry by entry."""
    return node.target in _ADDITIONS and not node.kwargs and len(node.args) == len(node.all_input_nodes) == 2


def _is_written(graph: Any, node: fx.Node, but: fx.Node) -> bool:
    """Whether another node than `but` changes the value of `node` in place."""
    return any(user is not but and works_in_place(user, graph) for user in node.users)


def _shape(specs: Mapping[str, Any], node: fx.Node) -> tuple[int, ...] | None:
    return getattr(specs.get(node.name), "shape", None)


def _is_rectified(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all readers of a node are rectifiers."""
    return bool(node.users) and all(
        isinstance(called(graph, user), nn.ReLU) if user.op == "call_module" else user.target in _RECTIFIERS
        for user in node.users
    )


def called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
