"""Forwards that change what the next call sees: counters, lists, moving averages."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, hostile, middle

KIND = "state"
SAYS = {"wanted": "said"}


class Buffered(Net):
    """With a buffer of one number, and one of a number for each channel."""

    def __init__(self, **layers: Any) -> None:
        super().__init__(**layers)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("ema", torch.full((8,), 0.5))


# -- numbers and lists in Python -------------------------------------------------------------------------------------


@hostile(KIND)
class CountsItsCalls(Net):
    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


@hostile(KIND, **SAYS)
class ScalesByItsCalls(Net):
    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@hostile(KIND, **SAYS)
class WarmsUp(Net):
    step = 0

    def between(self, x: Tensor) -> Tensor:
        self.step += 1
        return x + x.tanh() * min(1.0, self.step / 3)


@hostile(KIND, **SAYS)
class EverySecondCall(Net):
    def __init__(self) -> None:
        super().__init__()
        self.flips = itertools.cycle([True, False])

    def between(self, x: Tensor) -> Tensor:
        return x.flip(3) * 2 if next(self.flips) else x


@hostile(KIND, **SAYS)
class FirstCallOnly(Net):
    ready = False

    def between(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            return x * 2
        return x


@hostile(KIND)
class KeepsItsActivations(Net):
    last: Any = None

    def between(self, x: Tensor) -> Tensor:
        self.last = x
        return self.last * 2


@hostile(KIND, **SAYS)
class AddsItsLastActivations(Net):
    last: Any = None

    def between(self, x: Tensor) -> Tensor:
        given = x if self.last is None else x + self.last.mean((0, 2, 3), keepdim=True)
        self.last = given.detach()
        return given


@hostile(KIND)
class ListThatGrows(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def between(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        return x * 2


@hostile(KIND, **SAYS)
class ListThatIsRead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.deque[Any] = collections.deque(maxlen=3)

    def between(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().abs().mean())
        return x / sum(self.seen)


@hostile(KIND, **SAYS)
class ListWhoseLengthIsRead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def between(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return x * len(self.seen)


@hostile(KIND, **SAYS)
class KeyValueCache(Net):
    """As in decoding: what was seen before takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def between(self, x: Tensor) -> Tensor:
        keys = x.mean((0, 3))[None]
        keys = torch.cat([self.cache["keys"], keys], 2) if "keys" in self.cache else keys
        self.cache["keys"] = keys.detach()
        return x * keys.mean(2)[..., None, None]


@hostile(KIND)
class KeepsALoss(Net):
    aux: Any = None

    def between(self, x: Tensor) -> Tensor:
        self.aux = x.square().mean()
        return x * 2


@hostile(KIND, **SAYS)
class CountsInItsClass(Net):
    total = 0

    def between(self, x: Tensor) -> Tensor:
        type(self).total = (type(self).total + 1) % 5
        return x * (type(self).total + 1)


_CALLS = [0]


@middle(KIND, **SAYS)
def counts_in_the_module(self: Any, x: Tensor) -> Tensor:
    _CALLS[0] = (_CALLS[0] + 1) % 5
    return x * (_CALLS[0] + 1)


@hostile(KIND, **SAYS)
def counts_in_a_closure() -> nn.Module:
    count = itertools.count(1)
    return Net(lambda self, x: x * next(count))


# -- buffers ---------------------------------------------------------------------------------------------------------


@hostile(KIND, **SAYS)
class CountsInABuffer(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


@hostile(KIND, **SAYS)
class ScalesByABuffer(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


@hostile(KIND, **SAYS)
class ReassignsABuffer(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


@hostile(KIND, **SAYS)
class AverageInPlace(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.ema.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.ema.view(1, -1, 1, 1)


@hostile(KIND, **SAYS)
class AverageReassigned(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.ema = 0.9 * self.ema + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.ema.view(1, -1, 1, 1)


@hostile(KIND, **SAYS)
class AverageByCopy(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.ema.copy_(torch.lerp(self.ema, x.detach().mean((0, 2, 3)), 0.1))
        return x - self.ema.view(1, -1, 1, 1)


@hostile(KIND, **SAYS)
class AverageByData(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.ema.data = self.ema * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
        return x - self.ema.view(1, -1, 1, 1)


@hostile(KIND, **SAYS)
class AverageAfterUse(Buffered):
    def between(self, x: Tensor) -> Tensor:
        given = x - self.ema.view(1, -1, 1, 1)
        with torch.no_grad():
            self.ema[:] = self.ema * 0.5 + x.mean((0, 2, 3)) * 0.5
        return given


@hostile(KIND, **SAYS)
class AverageThatOnlyIsKept(Buffered):
    def between(self, x: Tensor) -> Tensor:
        self.ema.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x * 2


@hostile(KIND, **SAYS)
class AverageOfTheInput(Net):
    """A moving statistic of the images, as normalisers of observations have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        self.mean += (x.mean((0, 2, 3))[:, None, None] - self.mean) * len(x) / self.count
        return super().forward(x - self.mean)


@hostile(KIND, **SAYS)
class NormThatLearnsInEval(Net):
    """Batch statistics, and running ones that move, whatever the mode."""

    def __init__(self) -> None:
        super().__init__(bn=nn.BatchNorm2d(8))

    def between(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)


@hostile(KIND, **SAYS)
class NormKeptInTrainMode(Net):
    def __init__(self) -> None:
        super().__init__(bn=nn.BatchNorm2d(8))

    def between(self, x: Tensor) -> Tensor:
        return self.bn.train()(x)


@hostile(KIND)
class NormWithoutRunningStatistics(Net):
    def __init__(self) -> None:
        super().__init__(bn=nn.BatchNorm2d(8, track_running_stats=False))

    def between(self, x: Tensor) -> Tensor:
        return self.bn(x)


@hostile(KIND, **SAYS)
class InstanceNormWithRunningStatistics(Net):
    def __init__(self) -> None:
        super().__init__(norm=nn.InstanceNorm2d(8, track_running_stats=True, affine=True))

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


@hostile(KIND, **SAYS)
class ChangesAParameter(Net):
    def __init__(self) -> None:
        super().__init__(scale=nn.Parameter(torch.ones(8, 1, 1)))

    def between(self, x: Tensor) -> Tensor:
        self.scale.data.mul_(1.5)
        return x * self.scale


@hostile(KIND, **SAYS)
class ClipsItsWeights(Net):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c2.weight.clamp_(-0.05, 0.05)
        return x


@hostile(KIND, **SAYS)
class CodeBook(Net):
    """The codes that were chosen are counted, and less used ones drift: vector quantisation as it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 8))
        self.register_buffer("used", torch.zeros(6))

    def between(self, x: Tensor) -> Tensor:
        flat = x.permute(0, 2, 3, 1)
        chosen = (flat[..., None, :] - self.codes).square().sum(-1).argmin(-1)
        self.used.add_(F.one_hot(chosen, 6).float().mean((0, 1, 2)))
        self.codes.mul_(0.99)
        return x + (self.codes[chosen].permute(0, 3, 1, 2) - x).detach()
