"""Weights that are standardised over their channels: what such a layer reads has to stay whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, hostile, images, middle, sequences

KIND = "statistics"
EPS, WHOLE = 1e-4, ("g.weight",)


def _by_batch_norm(w: Tensor) -> Tensor:
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=EPS).reshape_as(w)


def _by_mean_and_std(w: Tensor) -> Tensor:
    axes = tuple(range(1, w.ndim))
    return (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True) + EPS)


def _by_scale_of_fan_in(w: Tensor) -> Tensor:
    """The scaled standardisation of normaliser-free networks."""
    axes = list(range(1, w.ndim))
    mean, var = w.mean(axes, keepdim=True), w.var(axes, keepdim=True)
    return (w - mean) * torch.rsqrt(torch.clamp(var * w[0].numel(), min=EPS))


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": _by_batch_norm,
    "mean_and_std": _by_mean_and_std,
    "scale_of_fan_in": _by_scale_of_fan_in,
    "centred_by_columns": lambda w: w - w.mean(1, keepdim=True),
    "root_mean_square": lambda w: F.rms_norm(w.flatten(1), (w[0].numel(),), eps=EPS).view_as(w),
    "softmax": lambda w: w.softmax(1),
    "binary_with_a_scale": lambda w: w.sign().detach() * w.abs().flatten(1).mean(1).view(-1, *[1] * (w.ndim - 1)),
    "largest_entries": lambda w: w * (w.abs() >= w.abs().flatten(1).median(1).values.view(-1, *[1] * (w.ndim - 1))),
    "standardised_over_its_rows": lambda w: (w - w.mean(0)) / (w.std(0) + EPS),
}


class Conv(nn.Conv2d):
    """A convolution whose weight is standardised in its forward."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, 3, padding=1, **options)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weigh(self.weight), self.bias, padding=1, groups=self.groups)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _by_mean_and_std(self.weight), self.bias)


def _conv(weigh: Callable[[Tensor], Tensor], **options: Any) -> nn.Module:
    return Net(lambda self, x: self.g(x), g=Conv(weigh, 8, 8, **options))


for _name, _weigh in STATISTICS.items():
    add(KIND, f"conv_{_name}", partial(_conv, _weigh), images, whole=() if "over_its_rows" in _name else WHOLE)
add(KIND, "grouped_batch_norm", partial(_conv, _by_batch_norm, groups=2), images, whole=WHOLE)
add(KIND, "depthwise_mean_and_std", partial(_conv, _by_mean_and_std, groups=8), images)


@hostile(KIND, sequences, whole=WHOLE)
def linear_mean_and_std() -> nn.Module:
    return Steps(lambda self, h, mask: self.g(h), g=Linear(16, 16))


@hostile(KIND, whole=("g.weight", "c2.weight"))
def several_layers() -> nn.Module:
    """Every layer is standardised, one behind another, around a shortcut."""
    c1, c2, g = (Conv(_by_batch_norm, a, b) for a, b in ((3, 8), (8, 10), (8, 8)))
    return Net(lambda self, x: x + self.g(F.silu(x)) * 0.2, c1=c1, c2=c2, g=g)


def _style() -> dict[str, Any]:
    return {"style": nn.Linear(8, 8), "weight": nn.Parameter(torch.randn(8, 8, 3, 3))}


@middle(KIND, _style, wanted="any", whole=("weight",))
def modulated(self: Any, x: Tensor) -> Tensor:
    """The style of a sample scales the weight's columns, and the rows are brought back to length one."""
    b, c, h, w = x.shape
    weight = self.weight * self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
    weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-4)
    return F.conv2d(x.reshape(1, b * c, h, w), weight.view(b * 8, c, 3, 3), padding=1, groups=b).view(b, 8, h, w)
