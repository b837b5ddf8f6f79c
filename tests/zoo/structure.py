"""How models are put together: sharing, several inputs and outputs, dead branches, containers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images, tensors


@case(images(), shrinks=("a", "b", "shared", "out"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(3, 8, 5), shared=conv(8, 10), out=conv(20, 6), head=head(6)))
def CalledOnTwoInputs(self, x: Tensor) -> Tensor:
    """One convolution reads two different tensors: their channels go in pairs."""
    u, v = self.shared(self.a(x).relu()), self.shared(self.b(x).flip(1).relu())
    return self.head(self.out(torch.cat([u, v.tanh()], 1)))


def two_towers(batch: int = 2) -> tuple[Tensor, Tensor]:
    return images()(batch), images()(batch + 1)[1:]


@case(two_towers, shrinks=("tower.0", "tower.2", "joint"))
@layers(lambda: dict(
    tower=nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    joint=nn.Linear(24, 8), head=nn.Linear(8, CLASSES),
))  # fmt: skip
def Siamese(self, left: Tensor, right: Tensor) -> Tensor:
    """Two inputs through one tower."""
    u, v = self.tower(left), self.tower(right)
    return self.head(self.joint(torch.cat([(u - v).abs(), u * v], 1)).relu())


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class TwoNames(nn.Module):
    """One module under two names: both keys are in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), head(8)
        self.alias, self.layers = self.b, nn.ModuleList([self.b, self.c, self.c])

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).relu()
        x = self.layers[1](self.alias(x)).relu()
        return self.head(self.layers[2](x))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class OneTensorInTwoModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8, bias=False), head(8)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu())


@case(tensors(12), shrinks=("encode", "narrow"))
@layers(lambda: dict(encode=nn.Linear(12, 10), narrow=nn.Linear(10, 6), bias=nn.Parameter(torch.zeros(12))))
def TiedAutoencoder(self, x: Tensor) -> Tensor:
    """The decoder uses the encoder's weights transposed."""
    code = self.narrow(self.encode(x).relu())
    wide = F.linear(code, self.narrow.weight.t())
    return F.linear(wide.relu(), self.encode.weight.t(), self.bias)


@case(tensors(12), shrinks=("a",), frozen=("table",))
class TiedWeights(nn.Module):
    """Two linear layers share one tensor; a third reads the input as well as the first of them, which stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.out = nn.Linear(8, 12, bias=False), nn.Linear(12, 8), nn.Linear(8, 12)
        self.out.weight = self.table.weight
        self.last = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.a(self.table(x).relu())
        return self.last(self.out(x))


def image_and_vector(batch: int = 2) -> tuple[Tensor, Tensor]:
    return images()(batch), tensors(6)(batch)


def named(batch: int = 2) -> dict[str, Tensor]:
    return dict(zip(("image", "vector"), image_and_vector(batch), strict=True))


@layers(lambda: dict(
    image=conv(3, 8), vector=nn.Linear(6, 10), gate=nn.Linear(10, 8), joint=nn.Linear(18, 12),
    head=nn.Linear(12, CLASSES),
))  # fmt: skip
def Multimodal(self, image: Tensor, vector: Tensor, scale: float = 0.5, extra: Tensor | None = None) -> Tensor:
    """An image and a vector, joined by concatenation and by a gate."""
    v = self.vector(vector).relu()
    maps = self.image(image) * self.gate(v).sigmoid()[..., None, None]
    if extra is not None:
        maps = maps + extra
    return self.head(self.joint(torch.cat([maps.mean((2, 3)), v * scale], -1)).relu())


add("several_inputs", Multimodal, image_and_vector, shrinks=("image", "vector", "gate", "joint"))
add("dict_input", Multimodal, named, shrinks=("image", "vector", "gate", "joint"))


@case(images(), shrinks=("a", "b", "d"), frozen=("head", "aux", "features"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 10), features=conv(10, 8), d=conv(8, 12), aux=nn.Linear(8, 4), head=nn.Linear(12, CLASSES),
))  # fmt: skip
def SeveralOutputs(self, x: Tensor) -> tuple[Tensor, dict[str, object]]:
    """A nest of outputs; one of them is a feature map, whose channels are part of the answer."""
    x = self.a(x).relu()
    aux = self.aux(x.mean((2, 3)))
    maps = self.features(self.b(x).relu())
    return self.head(self.d(maps).mean((2, 3))), {"aux": aux, "maps": [maps], "size": x.shape[2]}


class Heads(NamedTuple):
    logits: Tensor
    aux: Tensor


@case(images(), shrinks=("a", "b"), frozen=("one.2", "two.2"))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), one=head(8), two=head(8, 3)))
def NamedOutputs(self, x: Tensor) -> Heads:
    x = self.a(x).relu()
    return Heads(logits=self.one(self.b(x)), aux=self.two(x))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), head=head(8), dead=conv(8, 6), after=nn.BatchNorm2d(6), never=conv(8, 4),
    unused=nn.Parameter(torch.ones(7)),
))  # fmt: skip
def DeadBranch(self, x: Tensor) -> Tensor:
    """Layers whose result nobody reads, a layer that is never called, a parameter that is never used."""
    x = self.a(x).relu()
    self.after(self.dead(x)).sum()
    return self.head(self.b(x).relu())


class Stage(nn.Module):
    """A list of blocks in a dict of branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide": conv(width, width), "flat": nn.Sequential(conv(width, width, 1), nn.ReLU())})
            for _ in range(2)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + scale * block["wide"](x).relu() + block["flat"](x)
        return x


add(
    "nested_containers",
    lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(conv(3, 8)), nn.Sequential()), Stage(8), conv(8, 12), Stage(12), head(12)
    ),
    images(),
    shrinks=("0.0.0", "1.blocks.0.wide", "1.blocks.1.flat.0", "2", "3.blocks.1.wide"),
    any_size=True,
)


@case(images(), shrinks=("down1", "down2", "bottom", "up2", "merge2", "up1"))
@layers(lambda: dict(
    down1=conv(3, 6), down2=conv(6, 8), bottom=conv(8, 12), up2=nn.ConvTranspose2d(12, 8, 2, 2), merge2=conv(16, 8),
    up1=nn.ConvTranspose2d(8, 6, 2, 2), out=conv(12, 2, 1),
))  # fmt: skip
def Unet(self, x: Tensor) -> Tensor:
    """Skip connections by concatenation, transposed convolutions on the way up, a map as output."""
    one = self.down1(x).relu()
    two = self.down2(F.max_pool2d(one, 2)).relu()
    x = self.up2(self.bottom(F.avg_pool2d(two, 2)).relu())
    x = self.up1(self.merge2(torch.cat([x, two], 1)).relu())
    return self.out(torch.cat([one, x], 1))


@case(images(), shrinks=("primary", "next"), any_size=True)
@layers(lambda: dict(
    primary=conv(3, 7), cheap=conv(7, 7, groups=7), norm=nn.BatchNorm2d(7), next=conv(12, 8), head=head(8),
))  # fmt: skip
def Ghost(self, x: Tensor) -> Tensor:
    """GhostNet: cheap copies are appended, and what is too much is cut off."""
    x = self.primary(x).relu()
    x = torch.cat([x, self.norm(self.cheap(x))], 1)[:, :12, :, :]
    return self.head(self.next(x))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), head=head(6), share=nn.Parameter(torch.rand(2)),
    mix=nn.Parameter(torch.rand(2)),
))  # fmt: skip
def WeightedFusion(self, x: Tensor) -> Tensor:
    """BiFPN: maps are added with learned weights, one scalar a map."""
    share = self.share.relu()
    share = share / (share.sum() + 1e-4)
    x = share[0] * self.a(x) + share[1] * self.b(x)
    one, two = self.mix.softmax(0).unbind()
    return self.head(self.c(one * x.relu() + two * x))


@case(images(size=4), shrinks=("a", "theta", "phi", "g"))
@layers(lambda: dict(
    a=conv(3, 12), theta=conv(12, 6, 1), phi=conv(12, 6, 1), g=conv(12, 8, 1), out=conv(8, 12, 1), head=head(12),
))  # fmt: skip
def NonLocal(self, x: Tensor) -> Tensor:
    """Attention over the positions of a map, made of 1x1 convolutions and matrix products."""
    x = self.a(x).relu()
    b, _, h, w = x.shape
    theta, phi = self.theta(x).view(b, -1, h * w), self.phi(x).view(b, -1, h * w)
    weights = torch.matmul(theta.transpose(1, 2), phi).softmax(-1)
    y = torch.bmm(weights, self.g(x).flatten(2).permute(0, 2, 1)).transpose(1, 2).reshape(b, -1, h, w)
    return self.head(x + self.out(y))


@case(images(), shrinks=("stem", "shared", "norm", "after"), any_size=True)
@layers(lambda: dict(stem=conv(3, 8), shared=conv(8, 8), norm=nn.BatchNorm2d(8), after=conv(8, 12), head=head(12)))
def CalledTwice(self, x: Tensor) -> Tensor:
    """One convolution run three times in a row: what goes in and what comes out is one group."""
    x = self.stem(x)
    for _ in range(3):
        x = x + self.norm(self.shared(x)).relu()
    return self.head(self.after(x).relu())
