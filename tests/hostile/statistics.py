"""Weights that are standardised over their channels, in every spelling: what such a layer reads has to stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, hostile, images, middles, sequences

KIND = "statistics"
EPS, WHOLE = 1e-4, ("g.weight",)


def _by_batch_norm(w: Tensor) -> Tensor:
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=EPS).reshape_as(w)


def _by_group_norm(w: Tensor) -> Tensor:
    return F.group_norm(w.reshape(1, len(w), -1), len(w), eps=EPS).view(w.shape)


def _by_mean_and_std(w: Tensor) -> Tensor:
    axes = tuple(range(1, w.ndim))
    return (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True) + EPS)


def _by_var_mean(w: Tensor) -> Tensor:
    var, mean = torch.var_mean(w, dim=list(range(1, w.ndim)), keepdim=True, correction=0)
    return (w - mean) * torch.rsqrt(var + EPS)


def _by_scale_of_fan_in(w: Tensor) -> Tensor:
    """The scaled standardisation of normaliser-free networks."""
    fan_in = w[0].numel()
    axes = list(range(1, w.ndim))
    mean, var = w.mean(axes, keepdim=True), w.var(axes, keepdim=True)
    return (w - mean) * torch.rsqrt(torch.clamp(var * fan_in, min=EPS))


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": _by_batch_norm,
    "group_norm": _by_group_norm,
    "layer_norm": lambda w: F.layer_norm(w, w.shape[1:], eps=EPS),
    "instance_norm": lambda w: F.instance_norm(w.reshape(1, len(w), -1), eps=EPS).view_as(w),
    "native_batch_norm": lambda w: torch.batch_norm(
        w.view(1, len(w), -1), None, None, None, None, True, 0.0, EPS, False
    ).view_as(w),
    "mean_and_std": _by_mean_and_std,
    "var_mean": _by_var_mean,
    "scale_of_fan_in": _by_scale_of_fan_in,
    "centred_by_columns": lambda w: w - w.mean(1, keepdim=True),
    "centred_by_einsum": lambda w: w - (torch.einsum("oi...->o...", w) / w.shape[1]).unsqueeze(1),
    "normalized": lambda w: F.normalize(w.flatten(1)).view_as(w),
    "demodulated": lambda w: w * torch.rsqrt(w.square().sum(tuple(range(1, w.ndim)), keepdim=True) + EPS),
    "root_mean_square": lambda w: F.rms_norm(w.flatten(1), (w[0].numel(),), eps=EPS).view_as(w),
    "softmax": lambda w: w.softmax(1),
    "binary_with_a_scale": lambda w: w.sign().detach() * w.abs().flatten(1).mean(1).view(-1, *[1] * (w.ndim - 1)),
    "largest_entries": lambda w: w * (w.abs() >= w.abs().flatten(1).median(1).values.view(-1, *[1] * (w.ndim - 1))),
    "standardised_over_its_rows": lambda w: (w - w.mean(0)) / (w.std(0) + EPS),
}
MAY = ("native_batch_norm", "centred_by_einsum")
LINEAR = ("batch_norm", "mean_and_std", "binary_with_a_scale")


class Conv(nn.Conv2d):
    """A convolution whose weight is standardised in its forward."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weigh(self.weight), self.bias, padding=self.padding, groups=self.groups)


class Linear(nn.Linear):
    def __init__(self, weigh: Callable[[Tensor], Tensor], *sizes: int) -> None:
        super().__init__(*sizes)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weigh(self.weight), self.bias)


def _conv(weigh: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(lambda self, x: self.g(x), g=Conv(weigh, 8, 8, 3, padding=1, **options))


def _linear(weigh: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Steps(lambda self, h, mask: self.g(h), g=Linear(weigh, 16, 16))


for _name, _weigh in STATISTICS.items():
    _expected: dict[str, Any] = {"wanted": "any" if _name in MAY else "exact"}
    _expected |= {} if _name == "standardised_over_its_rows" else {"whole": WHOLE}
    add(KIND, f"conv_{_name}", _conv(_weigh), images, **_expected)
    if _name in LINEAR:
        add(KIND, f"linear_{_name}", _linear(_weigh), sequences, **_expected)
for _name in ("batch_norm", "mean_and_std"):
    add(KIND, f"grouped_{_name}", _conv(STATISTICS[_name], groups=2), images, whole=WHOLE)
    add(KIND, f"depthwise_{_name}", _conv(STATISTICS[_name], groups=8), images)


@hostile(KIND, whole=("g.weight", "c2.weight"))
class SeveralLayers(Net):
    """Every layer is standardised, one behind another, around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = (Conv(_by_batch_norm, a, b, 3, padding=1) for a, b in ((3, 8), (8, 10)))
        self.g = Conv(_by_scale_of_fan_in, 8, 8, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return x + self.g(F.silu(x)) * 0.2


@hostile(KIND, wanted="any", whole=("weight",))
class Modulated(Net):
    """The style of a sample scales the weight's columns, and the rows are brought back to length one."""

    def __init__(self) -> None:
        super().__init__(style=nn.Linear(8, 8), weight=nn.Parameter(torch.randn(8, 8, 3, 3)))

    def between(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        scales = self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
        weight = self.weight * scales
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-4)
        return F.conv2d(x.reshape(1, b * c, h, w), weight.view(b * 8, c, 3, 3), padding=1, groups=b).view(b, 8, h, w)


def _instance_by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x.reshape(1, -1, *x.shape[2:]), None, None, training=True).reshape_as(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "instances_by_batch_norm": _instance_by_batch,
    "all_channels_by_batch_norm": lambda x: F.batch_norm(x.reshape(1, len(x), -1), None, None, training=True).view_as(
        x
    ),
    "all_channels_by_layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
}
middles(KIND, ACTIVATIONS)
