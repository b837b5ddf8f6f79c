"""The graph that scoring runs: BatchNorms fused into convolutions, gradients laid out as the values they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.caller.example import TensorSpec
from fxprune.caller.isolation import evaluating

NORM_FUNCTIONS = (F.batch_norm, F.instance_norm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse(graph: fx.GraphModule, specs: Mapping[str, Any]) -> None:
    """Replace each convolution that only a BatchNorm reads, and that norm, by one layer that is equal in eval mode.

    Both must be called once. The two modules themselves do not change.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    called = {node: modules[node.target] for node in graph.graph.nodes if node.op == "call_module"}
    calls = Counter(map(id, called.values()))
    with evaluating(graph):
        for norm, second in called.items():
            conv: Any = next(iter(norm.all_input_nodes), None)
            if conv not in called or list(conv.users) != [norm]:
                continue
            layers = called[conv], second
            if all(calls[id(layer)] == 1 for layer in layers) and _can_fuse(*layers, specs.get(conv.name)):
                graph.add_module(f"fused_{norm.name}", fuse_conv_bn_eval(*layers))
                norm.target, norm.args, norm.kwargs = f"fused_{norm.name}", conv.args, conv.kwargs
                graph.graph.erase_node(conv)
    graph.recompile()


def _can_fuse(conv: Any, norm: Any, between: Any) -> bool:
    """Whether one convolution can replace both: not on an unbatched input, where the norm works along another axis."""
    plain = type(conv) in CONVOLUTIONS and type(norm) in NORMS and norm.running_mean is not None
    return plain and isinstance(between, TensorSpec) and len(between.shape) == conv.weight.ndim


def keep_layouts(graph: fx.GraphModule) -> None:
    """Give the gradient of every norm's output the memory layout of that output."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in list(graph.graph.nodes):
        called = modules[str(node.target)] if node.op == "call_module" else None
        if node.target in NORM_FUNCTIONS or isinstance(called, nn.modules.batchnorm._NormBase):
            with graph.graph.inserting_after(node):
                same = graph.graph.call_function(laid_out, (node,))
            node.replace_all_uses_with(same, delete_user_cb=lambda user, same=same: user is not same)
    graph.recompile()


def laid_out(x: Tensor) -> Tensor:
    """The same tensor; its gradient will have its strides."""
    if x.requires_grad:
        shape, strides = x.shape, x.stride()

        def like(grad: Tensor | None) -> Tensor | None:
            if grad is None or grad.stride() == strides:  # None comes from a function without a gradient
                return grad
            return grad.new_empty_strided(shape, strides).copy_(grad)

        x.register_hook(like)
    return x
