"""Subclasses of layers that compute in other places than the layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, add, conv, hostile, images

KIND = "hooks"


class CalledTwice(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class ConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class Circular(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


class ReadsTwice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x.square(), self.weight, None, padding=1)


class ReadsTransposed(nn.Conv2d):
    """Square: the weight is read along both of its axes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(super().forward(x), self.weight.transpose(0, 1), None, padding=1)


class WeightProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)

    @property
    def weight(self) -> Tensor:
        return self.raw * 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class WeightByGetattribute(nn.Conv2d):
    """Whoever asks the layer for its weight gets another one than its state_dict has."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found * 2 if name == "weight" else found


class BiasByGetattribute(nn.Conv2d):
    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found + 1 if name == "bias" and isinstance(found, Tensor) else found


class Padded(nn.Conv2d):
    """A padding that the constructor does not know of."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.padding_mode, self._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


class Changes(nn.Conv2d):
    """Its dilation is set when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.dilation = self.padding = (2, 2)
        return super().forward(x)


class LeakyByCall(nn.ReLU):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) - 0.1 * super().__call__(-x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualByCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return x + super().__call__(x)


class NormOfItsOwn(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean * 2, self.running_var, self.weight, self.bias)


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "call": lambda: CalledTwice(8, 8, 3, padding=1),
    "conv_forward": lambda: ConvForward(8, 8, 3, padding=1),
    "conv_forward_with_padding": lambda: Circular(8, 8, 3),
    "reads_its_weight_twice": lambda: ReadsTwice(8, 8, 3, padding=1),
    "reads_its_weight_transposed": lambda: ReadsTransposed(8, 8, 3, padding=1),
    "weight_is_a_property": WeightProperty,
    "weight_by_getattribute": lambda: WeightByGetattribute(8, 8, 3, padding=1),
    "bias_by_getattribute": lambda: BiasByGetattribute(8, 8, 3, padding=1),
    "padding_is_set": lambda: Padded(8, 8, 3, padding=1),
    "changes_its_attributes": lambda: Changes(8, 8, 3, padding=1),
    "activation_by_call": LeakyByCall,
    "sequential": lambda: Residual(conv(8, 8), nn.ReLU(), conv(8, 8)),
    "sequential_by_call": lambda: ResidualByCall(conv(8, 8), nn.ReLU(), conv(8, 8)),
    "norm_of_its_own": lambda: NormOfItsOwn(8),
}


def _with_layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda self, x: self.g(x), g=make())


for _name, _make in SUBCLASSES.items():
    add(KIND, f"subclass_{_name}", _with_layer(_make), images)


@hostile(KIND)
class RootByCall(Net):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 3)


@hostile(KIND)
class RootByCallImpl(Net):
    def _call_impl(self, x: Tensor) -> Tensor:
        return super()._call_impl(x * 3)


@hostile(KIND)
class ClassOfAnInstance(Net):
    """A layer that becomes of another class after it was made."""

    def __init__(self) -> None:
        super().__init__(g=conv(8, 8))
        self.g.__class__ = ConvForward

    def between(self, x: Tensor) -> Tensor:
        return self.g(x)
