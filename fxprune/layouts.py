"""Layouts: a norm's gradient lies in memory as its output does; scoring does not leave that to what reads it.

On CPUs the backward kernel behind nn.BatchNorm2d and nn.InstanceNorm2d, and their 3d forms, may take one axis for
another where one has a single place, as that of the samples in a batch of one, and the gradient is laid out otherwise
than the output (seen with torch 2.14). An InstanceNorm hands the kernel any number of samples as one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.tracing.batchnorm import FollowingBatchNorm

NORMS = (nn.modules.batchnorm._NormBase, FollowingBatchNorm)
FUNCTIONS = (F.batch_norm, F.instance_norm)


def keep(graph: fx.GraphModule) -> None:
    """Have every gradient that comes back to a norm laid out as what the norm gave."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in list(graph.graph.nodes):
        called = modules[str(node.target)] if node.op == "call_module" else None
        if node.target in FUNCTIONS or isinstance(called, NORMS):
            with graph.graph.inserting_after(node):
                same = graph.graph.call_function(laid_out, (node,))
            node.replace_all_uses_with(same, delete_user_cb=lambda user, same=same: user is not same)
    graph.recompile()


def laid_out(x: Tensor) -> Tensor:
    """The same tensor, whose gradient will have its strides."""
    if x.requires_grad:
        shape, strides = x.shape, x.stride()

        def like(grad: Tensor | None) -> Tensor | None:
            if grad is None or grad.stride() == strides:  # none comes from a function that gives none
                return grad
            return grad.new_empty_strided(shape, strides).copy_(grad)

        x.register_hook(like)
    return x
