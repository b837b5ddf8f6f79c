"""Steps with weights: convolutions of all kinds, linear layers, batch norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import SIZE, apply, back, drawn, even, kind, rows

add = partial(kind, "layers")


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _gate(inputs: int, drawn: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, drawn, 1), nn.ReLU(), nn.Conv2d(drawn, inputs, 1), nn.Sigmoid())


def _flat(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One axis of positions."""
    return call(x.flatten(2)).unflatten(2, (SIZE, SIZE))


def _deep(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Three axes of positions, the first of one place."""
    return call(x.unsqueeze(2)).squeeze(2)


def _functional(function: Callable[..., Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda layer, x: function(x, layer.weight, layer.bias, padding=1)


add("conv", apply, _conv, width=drawn)
add("conv without bias", apply, lambda i, o: _conv(i, o, bias=False), width=drawn)
add("transposed", apply, lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1), width=drawn)
add("grouped", apply, lambda i, o: _conv(i, o, groups=2), width=drawn, needs=even, alike=False)
add(
    "four groups",
    apply,
    lambda i, o: _conv(i, o, groups=4),
    width=drawn,
    needs=lambda i: i % 4 == 0,
    alike=False,
)
add("depthwise", apply, lambda i, o: _conv(i, i, groups=i))
add(
    "multiplied",
    apply,
    lambda i, o: _conv(i, 2 * i, groups=i),
    width=lambda i, o: 2 * i,
    needs=lambda i: i <= 12,
)
add("linear", lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Linear, width=drawn)
add("F.linear", lambda own, x: back(F.linear(rows(x), own.weight, own.bias)), nn.Linear, width=drawn)
add("gate", lambda layer, x: x * layer(F.adaptive_avg_pool2d(x, 1)), _gate)

for _name, _view in (("1d", _flat), ("2d", apply), ("3d", _deep)):
    for _stem, _function in (("Conv", "conv"), ("ConvTranspose", "conv_transpose")):
        _class = getattr(nn, f"{_stem}{_name}")
        _made = partial(lambda c, i, o: c(i, o, 3, padding=1), _class)
        add(f"nn.{_stem}{_name}", lambda layer, x, view=_view: view(layer, x), _made, width=drawn)
        _run = _functional(getattr(F, f"{_function}{_name}"))
        add(f"F.{_function}{_name}", lambda own, x, v=_view, f=_run: v(partial(f, own), x), _made, width=drawn)
    for _norm in ("BatchNorm", "InstanceNorm"):
        _class = getattr(nn, f"{_norm}{_name}")
        _made = partial(lambda c, i, o: c(i, affine=True), _class)
        add(f"nn.{_norm}{_name}", lambda layer, x, view=_view: view(layer, x), _made)
add("nn.SyncBatchNorm", apply, lambda i, o: nn.SyncBatchNorm(i))
add(
    "F.batch_norm",
    lambda own, x: F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias),
    lambda i, o: nn.BatchNorm2d(i),
)
add(
    "F.instance_norm",
    lambda own, x: F.instance_norm(x, None, None, own.weight, own.bias),
    lambda i, o: nn.InstanceNorm2d(i, affine=True),
)
add("norm without affine", apply, lambda i, o: nn.BatchNorm2d(i, affine=False))
add(
    "norm after conv",
    lambda own, x: own(x).relu(),
    lambda i, o: nn.Sequential(_conv(i, o), nn.BatchNorm2d(o)),
    width=drawn,
)
