"""What a layer of the rewritten graph should give: the original's values, wherever they can be aimed at best."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """Where a layer's output is aimed: at the value of `node`, behind a BatchNorm or an addition or neither.

    `norm` is the BatchNorm that follows the layer; where the aim lies `behind` it, the layer's output is scaled and
    shifted by it on the way. `other` is what is added to it, whose values are known already. `rectified` says that
    nothing but rectifiers read the value.
    """

    node: fx.Node
    norm: nn.Module | None
    behind: bool
    other: fx.Node | None
    rectified: bool


def aim_of(graph: fx.GraphModule, layer: fx.Node, known: Any) -> Aim:
    """Where the output of the node `layer` is aimed: at the sum that it goes into, if the other summand is `known`.

    Aiming at the sum lets the layer mend what went wrong in the other summand, too: in a residual network each block
    takes back what the ones before it did to the stream.
    """
    norm_node, end = norm_after(graph, layer)
    norm = None if norm_node is None else graph.get_submodule(str(norm_node.target))
    user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and user.target in _ADDITIONS and not user.kwargs and len(user.all_input_nodes) == 2:
        (other,) = (source for source in user.all_input_nodes if source is not end)
        if other in known:
            return Aim(user, norm, True, other, _is_rectified(graph, user))
    rectified = _is_rectified(graph, end)
    return Aim(end if rectified else layer, norm, rectified, None, rectified)


def norm_after(graph: fx.GraphModule, layer: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The BatchNorm that alone follows a layer, and the last node before anything else follows."""
    norm, end = None, layer
    while len(end.users) == 1:
        (user,) = end.users
        module = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if norm is None and isinstance(module, _BATCH_NORMS) and module.running_mean is not None:
            norm = user
        elif not isinstance(module, _THROUGH):
            break
        end = user
    return norm, end


def _is_rectified(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all that reads a node are rectifiers."""

    def rectifies(user: fx.Node) -> bool:
        if user.op == "call_module":
            return isinstance(graph.get_submodule(str(user.target)), nn.ReLU)
        return user.target in _RECTIFIERS

    return bool(node.users) and all(map(rectifies, node.users))


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as a scale and a shift of each channel."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()
