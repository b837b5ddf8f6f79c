"""Steps of torchvision: boxes of maps, and convolutions whose places are moved."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import ops

from steps.kind import SIZE, drawn, exactly, kind

add = partial(kind, "vision")
_ALIGNED, _POOLED = torch.ops.torchvision.roi_align, torch.ops.torchvision.roi_pool
_MOVED = torch.ops.torchvision.deform_conv2d


def _boxes(x: Tensor) -> Tensor:
    """One box of every sample, the middle of its map: (N, 5)."""
    first = torch.arange(x.shape[0], dtype=x.dtype)[:, None] + 0 * x.sum((1, 2, 3))[:, None]
    return torch.cat([first, first * 0 + 1, first * 0 + 1, first * 0 + 5, first * 0 + 5], 1)


_SIZES = (1.0, SIZE, SIZE)
add("ops.roi_align", lambda _, x: exactly(ops.roi_align, x, _boxes(x), SIZE))
add("ops.roi_pool", lambda _, x: exactly(ops.roi_pool, x, _boxes(x), SIZE))
add("roi_align", lambda _, x: exactly(_ALIGNED, x, _boxes(x), *_SIZES, 2, False))
add("roi_align.default", lambda _, x: exactly(_ALIGNED.default, x, _boxes(x), *_SIZES, 2, True))
add("roi_pool", lambda _, x: exactly(_POOLED, x, _boxes(x), *_SIZES)[0])
add("roi_pool.default", lambda _, x: exactly(_POOLED.default, x, _boxes(x), *_SIZES)[0])


class Moved(nn.Module):
    """A deformable convolution of 3 x 3 with the offsets of another convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.places, self.bias = nn.Conv2d(inputs, 18, 3, padding=1), nn.Parameter(torch.randn(outputs))
        self.weight, self.groups = nn.Parameter(torch.randn(outputs, inputs // groups, 3, 3) / 9), groups

    def forward(self, x: Tensor, call: Any) -> Tensor:
        one, ones = torch.ones(x.shape[0], 1, dtype=x.dtype), (1,) * 6
        return exactly(call, x, self.weight, self.places(x).tanh(), one, self.bias, *ones, self.groups, 1, False)


add("deform_conv2d", lambda own, x: own(x, _MOVED), Moved, width=drawn, alike=False)
add("deform_conv2d.default", lambda own, x: own(x, _MOVED.default), Moved, width=drawn, alike=False)
add(
    "deform_conv2d in groups",
    lambda own, x: own(x, _MOVED),
    lambda i, o: Moved(i, o, 2),
    width=drawn,
    needs=lambda i: i % 2 == 0,
    alike=False,
    whole=True,
)
