"""Element-wise arithmetic in all its spellings, and the gates that are made of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images

Binary = Callable[[Tensor, Tensor], Tensor]

BINARY: dict[str, Binary] = {
    "add_method": lambda u, v: u.add(v, alpha=2),
    "add_in_place": lambda u, v: u.add_(v),
    "add_augmented": operator.iadd,
    "div_augmented": lambda u, v: operator.itruediv(u, v.exp()),
    "lerp": lambda u, v: torch.lerp(u, v, 0.3),
    "power": lambda u, v: u.abs() ** 2 + torch.pow(v, 2) - u**3,
    "masked_fill": lambda u, v: u.masked_fill(v > 0, 0.0),
    "scalars": lambda u, v: 2 - (1 + u * 3) / 2 + (v - 1) * -0.5 + 1 / (1 + v.exp()),
}


class Meeting(nn.Module):
    """Two convolutions whose outputs meet in one operation."""

    def __init__(self, meet: Binary) -> None:
        super().__init__()
        self.a, self.b, self.meet = conv(3, 8), conv(3, 8), meet
        self.c, self.head = conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.meet(self.a(x) * 2, self.b(x).tanh())).relu())


for _name, _meet in BINARY.items():
    add(_name, partial(Meeting, _meet), images(), shrinks=("a", "b", "c"), any_size=True)


@case(images(), shrinks=("stem", "a.conv1", "a.conv2", "down.0", "b.conv1", "b.conv2"), any_size=True)
class Residual(nn.Module):
    """Two basic blocks; the second changes the width and has a projection on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = self.block(8, 8), self.block(8, 12, stride=2)
        self.down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu, self.head = nn.ReLU(inplace=True), head(12)

    @staticmethod
    def block(inputs: int, width: int, stride: int = 1) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "conv1": conv(inputs, width, stride=stride, bias=False),
                "bn1": nn.BatchNorm2d(width),
                "conv2": conv(width, width, bias=False),
                "bn2": nn.BatchNorm2d(width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        for block, shortcut in ((self.a, nn.Identity()), (self.b, self.down)):
            out = self.relu(block["bn1"](block["conv1"](x)))
            out = block["bn2"](block["conv2"](out))
            out += shortcut(x) if shortcut is self.down else x
            x = self.relu(out)
        return self.head(x)


@case(images(), shrinks=("a", "squeeze", "b", "reduce", "c", "d"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), squeeze=nn.Linear(8, 4), excite=nn.Linear(4, 8), b=conv(8, 12), reduce=nn.Conv2d(12, 6, 1),
    widen=nn.Conv2d(6, 12, 1), c=conv(12, 8), d=conv(8, 8), head=head(8), pool=nn.AdaptiveAvgPool2d(1),
    gate=nn.Hardsigmoid(), sigmoid=nn.Sigmoid(),
))  # fmt: skip
def SqueezeExcite(self, x: Tensor) -> Tensor:
    """Twice: with linear layers and a view, and with 1x1 convolutions."""
    x = self.a(x)
    b, c, _, _ = x.size()
    y = self.pool(x).view(b, c)
    y = self.sigmoid(self.excite(self.squeeze(y).relu())).view(b, c, 1, 1)
    x = self.b(x * y.expand_as(x)).relu()
    x = self.c(self.gate(self.widen(self.reduce(x.mean((2, 3), keepdim=True)).relu())) * x)
    return self.head(self.d(x.mul(x.mean((2, 3))[:, :, None, None].sigmoid())))


@case(images(), shrinks=("a", "b", "query"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), mask=conv(8, 1), b=conv(8, 10), head=head(10), key=conv(8, 6, 1), query=conv(10, 6, 1),
    score=conv(6, 1, 1),
))  # fmt: skip
def SpatialGate(self, x: Tensor) -> Tensor:
    """One map that scales all channels (its one channel cannot go), and the additive gate of attention U-Nets."""
    x = self.a(x).relu()
    y = self.b(x * torch.sigmoid(self.mask(x)))
    weight = self.score((self.key(x) + self.query(y)).relu()).sigmoid()
    return self.head(y * weight)


@case(images(), shrinks=("a", "b", "query"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), back=conv(8, 3), b=conv(6, 8), query=conv(8, 8), head=head(8)))
def InputsJoin(self, x: Tensor) -> Tensor:
    """The image itself is added to three channels, which then have to stay."""
    y = x + self.back(self.a(x).relu())
    z = self.b(torch.cat([x - y, y], 1))
    return self.head(z * torch.tanh(self.query(z)))


@case(images(), shrinks=("shared", "low"), frozen=("a", "b"))
@layers(lambda: dict(shared=conv(3, 8), low=conv(8, 8), a=nn.Linear(8, CLASSES), b=nn.Linear(8, CLASSES)))
def OutputsJoin(self, x: Tensor) -> Tensor:
    """What is added to an output has to stay."""
    x = self.shared(x).relu()
    return self.a(x.mean((2, 3))) + self.b(self.low(x).amax((2, 3)))
