"""Layers that keep their channels apart: convolutions, normalisations, activations, pools, paddings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images


def layer(name: str, dim: int) -> Any:
    """The class of ``nn`` that is called ``name`` in ``dim`` dimensions."""
    return getattr(nn, f"{name}{dim}d")


def pooled(x: Tensor, dim: int) -> Tensor:
    """The mean over all positions."""
    return x.mean(tuple(range(2, 2 + dim)))


class Convolutions(nn.Module):
    """Convolution, BatchNorm after and before, stride, dilation, even kernels, no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, convolution, norm = dim, layer("Conv", dim), layer("BatchNorm", dim)
        self.a, self.after = convolution(3, 8, 3, stride=2, bias=False), norm(8)
        self.b, self.before = convolution(8, 10, 2, dilation=2, padding=1), norm(8)
        self.c, self.head = convolution(10, 12, 3, padding="same", padding_mode="circular"), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.a(x)).relu()
        x = self.b(self.before(x).relu())
        return self.head(pooled(self.c(x).relu(), self.dim))


class PreActivation(nn.Module):
    """BatchNorm and ReLU before each convolution, with a residual connection around two of them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, convolution, norm = dim, layer("Conv", dim), layer("BatchNorm", dim)
        self.norm0, self.stem = norm(3), convolution(3, 8, 3, padding=1)
        self.norm1, self.a = norm(8), convolution(8, 12, 3, padding=1)
        self.norm2, self.b = norm(12), convolution(12, 8, 3, padding=1)
        self.norm3, self.head = norm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.norm0(x))
        x = x + self.b(self.norm2(self.a(self.norm1(x).relu())).relu())
        return self.head(pooled(self.norm3(x).relu(), self.dim))


class Transposed(nn.Module):
    """A decoder of transposed convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        convolution, norm = layer("ConvTranspose", dim), layer("BatchNorm", dim)
        self.a, self.norm = convolution(3, 8, 3, stride=2, output_padding=1), norm(8)
        self.b = convolution(8, 12, 2, stride=2, bias=False)
        self.c = convolution(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()).relu())


for _dim in (1, 2, 3):
    _example = images(dim=_dim)
    _spatial = {"any_size": True}
    add(f"conv{_dim}d", partial(Convolutions, _dim), _example, shrinks=("a", "after", "b", "c"), **_spatial)
    add(f"preactivation{_dim}d", partial(PreActivation, _dim), _example, shrinks=("stem", "norm1", "a"), **_spatial)
    add(f"conv_transpose{_dim}d", partial(Transposed, _dim), images(size=4, dim=_dim), shrinks=("a", "norm", "b"))


@case(images(), shrinks=("a", "b", "c", "d"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), head=head(8), relu=nn.ReLU(inplace=True),
    silu=nn.SiLU(True),
))  # fmt: skip
def ActivationsInPlace(self, x: Tensor) -> Tensor:
    x = self.relu(self.silu(self.a(x)))
    x = F.leaky_relu(F.hardswish(self.b(x), inplace=True), 0.1, inplace=True)
    x = torch.relu_(self.c(x).clamp_(-2, 2))
    return self.head(F.elu(self.d(x).neg_(), inplace=True))


add(
    "dropouts",
    lambda: nn.Sequential(
        conv(3, 8), nn.Dropout2d(), nn.ReLU(), conv(8, 8), nn.AlphaDropout(), conv(8, 8), nn.FeatureAlphaDropout(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(2), nn.Dropout1d(), nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.9),
        nn.Linear(16, CLASSES),
    ),
    images(),
    shrinks=("0", "3", "5", "11"),
)  # fmt: skip


@case(images(), shrinks=("a", "b", "c"))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=nn.Linear(8, 12), head=nn.Linear(12, CLASSES)))
def DropoutFunctions(self, x: Tensor) -> Tensor:
    x = F.dropout2d(self.a(x), 0.5, self.training)
    x = F.dropout(self.b(x).relu(), training=self.training).mean((2, 3))
    x = F.alpha_dropout(self.c(x), 0.5, training=self.training)
    return self.head(F.dropout(x, 0.3, training=self.training, inplace=True))


@case(images(), shrinks=("a", "b", "c"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), out=conv(6, 2), pool=nn.MaxPool2d(2, return_indices=True),
    unpool=nn.MaxUnpool2d(2),
))  # fmt: skip
def Unpooling(self, x: Tensor) -> Tensor:
    """Max pooling that hands its indices to the unpooling, as in SegNet."""
    x, where = self.pool(self.a(x).relu())
    x = self.unpool(self.b(x), where)
    x, where = F.max_pool2d(self.c(x), 2, return_indices=True)
    return self.out(F.max_unpool2d(x, where, 2))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), nearest=nn.Upsample(scale_factor=2),
    bilinear=nn.Upsample(scale_factor=0.5, mode="bilinear", align_corners=False),
    old=nn.UpsamplingBilinear2d(scale_factor=2), head=head(8),
))  # fmt: skip
def Upsampling(self, x: Tensor) -> Tensor:
    y = self.b(self.nearest(self.a(x)).relu())
    y = self.c(self.bilinear(y))
    y = F.interpolate(self.d(y), size=x.shape[2:], mode="bicubic", align_corners=True)
    return self.head(self.old(F.interpolate(y, scale_factor=2, mode="nearest")))


@case(images(), shrinks=("a", "b", "up", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8, stride=2), up=nn.ConvTranspose2d(8, 8, 3, 2, 1), c=conv(8, 6, stride=2),
    last=nn.ConvTranspose2d(6, 2, 3, 2, 1),
))  # fmt: skip
def TransposedToSize(self, x: Tensor) -> Tensor:
    """The size of the output is given, once with and once without its batch and channels."""
    x = self.a(x).relu()
    y = self.up(self.b(x).relu(), output_size=x.size())
    return self.last(self.c(x + y), x.shape[2:])
