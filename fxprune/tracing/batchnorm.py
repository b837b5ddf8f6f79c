"""Batch normalisation without parameters of its own, for models that call F.batch_norm in a BatchNorm of theirs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.layers import batch_norm
from fxprune.rules.table import rule


class FollowingBatchNorm(nn.Module):
    """F.batch_norm, whose flag tracing has fixed, made to follow the mode of the module that it is a child of."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The batch normalised by its own statistics in training, by the running ones in eval mode."""
        training = self.training or mean is None
        return F.batch_norm(x, mean, var, weight, bias, training, self.momentum, self.eps)


@rule(FollowingBatchNorm)
def following_batch_norm(ctx: Context, module: FollowingBatchNorm, *args: Labels) -> Labels:
    """Statistics and affine parameters of each channel by itself."""
    return batch_norm(ctx, *args)
