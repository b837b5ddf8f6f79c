"""The registry of hostile networks, and the few small networks that most of them are a variation of."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn
from zoo.case import Inputs, conv, randomise

Build = Callable[[], nn.Module]
Layers = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One small network whose graph is easily another network.

    ``wanted`` is the answer that is reasonable: "exact"; "any", which is exact or refused; or "said", where a warning
    may also say that the graph is not the network at every call. ``plain`` is what makes the network's computed weights
    permanent. ``whole`` are patterns of the parameters of which a statistic is taken: what they read has to stay.
    """

    kind: str
    name: str
    make: Build
    inputs: Callable[[int, int], Inputs]  # of a number of samples and a seed
    wanted: str = "exact"
    plain: Callable[[nn.Module], nn.Module] = lambda model: model
    whole: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The network anew, with the same weights each time."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return randomise(self.make()).eval()


HOSTILE: dict[str, Hostile] = {}


def add(kind: str, name: str, make: Build, inputs: Callable[[int, int], Inputs], **expectations: Any) -> None:
    """Register the networks that ``make`` gives."""
    name = f"{kind}-{name}"
    if name in HOSTILE:
        raise ValueError(f"two networks are called {name}")
    HOSTILE[name] = Hostile(kind, name, make, inputs, **expectations)


def _seeded(batch: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * batch + seed)


def images(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=_seeded(batch, seed))


def sequences(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 5, 6, generator=_seeded(batch, seed))


def masked(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences, and which of their steps count, as floats."""
    return sequences(batch, seed), (torch.rand(batch, 5, generator=_seeded(batch, seed + 99)) > 0.4).float()


class Net(nn.Module):
    """Two convolutions with something between them, and a classifier."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor] = lambda self, x: x, **layers: Any) -> None:
        super().__init__()
        self.c1, self.c2, self.f, self.middle = conv(3, 8), conv(8, 10), nn.Linear(10, 4), middle
        for name, layer in layers.items():
            setattr(self, name, layer)

    def between(self, x: Tensor) -> Tensor:
        return self.middle(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.c2(self.between(self.c1(x)))).mean((2, 3)))


@layers(lambda: dict(
    c1=conv(3, 8), bn=nn.BatchNorm2d(8), act=nn.ReLU(), block=nn.Sequential(conv(8, 12), nn.ReLU()),
    c2=conv(12, 10), f=nn.Linear(10, 4),
))  # fmt: skip
def Deep(self, x: Tensor) -> Tensor:
    """A network of all common kinds of layers and containers."""
    x = self.c2(self.block(self.act(self.bn(self.c1(x)))))
    return self.f(F.relu(x).mean((2, 3)))


class Steps(nn.Module):
    """Two linear layers over a sequence with something between them that may look at a mask, and a classifier."""

    def __init__(self, middle: Callable[[Any, Tensor, Any], Tensor], **layers: Any) -> None:
        super().__init__()
        self.a, self.b, self.f, self.middle = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 4), middle
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.middle(self, self.a(x).relu(), mask)
        return self.f(self.b(x).relu().mean(1))


def hostile(kind: str, inputs: Callable[[int, int], Inputs] = images, **expectations: Any) -> Callable[[Any], Any]:
    """Register a function, or a class, that makes a network."""

    def register(make: Any) -> Any:
        add(kind, make.__name__.lower(), make, inputs, **expectations)
        return make

    return register


def middle(kind: str, layers: Layers = dict, **expectations: Any) -> Callable[[Any], Any]:
    """Register a `Net` with this function between its convolutions, and these layers beside them."""

    def register(function: Any) -> Any:
        add(kind, function.__name__, lambda: Net(function, **layers()), images, **expectations)
        return function

    return register


def middles(kind: str, functions: Mapping[str, Any], may: Collection[str] = (), **expectations: Any) -> None:
    """Register a `Net` for each of these functions of an activation; those named in ``may`` may be refused."""
    for name, function in functions.items():
        between = partial(lambda function, self, x: function(x), function)
        add(kind, name, partial(Net, between), images, **expectations | ({"wanted": "any"} if name in may else {}))


def with_layers(kind: str, layers: Layers, functions: Mapping[str, Any], **expectations: Any) -> None:
    """Register a `Net` with these layers for each of these functions of the network and an activation."""
    for name, function in functions.items():
        make = partial(lambda function: Net(function, **layers()), function)
        add(kind, name, make, images, **expectations)


def changed(kind: str, changes: Mapping[str, Callable[[Any], Any]]) -> None:
    """Register a `Deep` for each of these functions that change one."""
    for name, change in changes.items():
        add(kind, name, partial(_changed, change), images)


def _changed(change: Callable[[Any], Any]) -> nn.Module:
    net = Deep()
    change(net)
    return net
