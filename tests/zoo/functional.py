"""Layers spelled as functions of raw parameters, scale parameters, buffers in the forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, head, images, tensors


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[1] ** 0.5)


@case(images(), shrinks=("first", "second", "mean", "up", "last"), any_size=True)
class FunctionalConv(nn.Module):
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_bias = weight(8, 3, 3, 3), nn.Parameter(torch.randn(8))
        self.second, self.gain, self.shift = weight(12, 8, 3, 3), nn.Parameter(torch.rand(12)), weight(1, 12)
        self.up, self.slope, self.last = weight(12, 6, 2, 2), nn.Parameter(torch.rand(6)), weight(8, 3, 1, 1)
        self.head = head(8)
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("var", torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first, self.first_bias, padding=1).relu()
        x = torch.conv2d(x, self.second, stride=2)
        x = F.batch_norm(x, self.mean, self.var, self.gain, self.shift.flatten()).relu()
        x = F.prelu(F.conv_transpose2d(x, self.up, stride=2), self.slope)
        return self.head(F.conv2d(x, weight=self.last, groups=2).relu())


@case(tensors(6), shrinks=("first", "second", "third", "fourth", "fifth"))
class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = weight(12, 6), nn.Parameter(torch.randn(12))
        self.second, self.third, self.fourth = weight(12, 10), weight(10, 8), weight(14, 8)
        self.fifth, self.out, self.final = weight(14, 10), weight(10, CLASSES), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first, self.bias).relu()
        x = (x @ self.second).relu()
        x = torch.matmul(x, self.third).tanh()
        x = x.matmul(self.fourth.t()).relu()
        x = torch.mm(x, self.fifth).sigmoid()
        return torch.addmm(self.final, x, self.out)


@case(images(), shrinks=("first", "second", "third"), any_size=True)
class Einsums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.out = weight(8, 3), weight(8, 10), weight(12, 10), weight(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bchw,oc->bohw", x, self.first).relu()
        x = torch.einsum("bchw,cd->bdhw", x, self.second).relu()
        x = torch.einsum("oc,bc...->bo...", self.third, x).tanh()
        return torch.einsum("bc,cd->bd", x.mean((2, 3)), self.out)


@case(images(), shrinks=("a", "b", "gamma", "beta", "c"), any_size=True)
class ScaleParameters(nn.Module):
    """Layer scale and bias in the shapes in which they are found."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gamma, self.beta = (
            conv(3, 8),
            nn.Parameter(torch.randn(8, 1, 1)),
            nn.Parameter(torch.randn(1, 8, 1, 1)),
        )
        self.b, self.scale, self.bias = (
            conv(8, 10),
            nn.Parameter(torch.randn(1, 10, 1, 1)),
            nn.Parameter(torch.randn(10)),
        )
        self.c, self.last, self.temperature = (
            nn.Linear(10, 8),
            nn.Parameter(torch.randn(8)),
            nn.Parameter(torch.tensor(0.7)),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.gamma + self.beta
        x = self.b(x.relu()).mul(self.scale) + self.bias.view(1, -1, 1, 1)
        x = self.c((x + self.bias[:, None, None]).permute(0, 2, 3, 1)) * self.last + self.last.exp()
        return self.head(x.mean((1, 2)) / self.temperature)


@case(images(), shrinks=("a", "b", "mean", "mask"))
class Buffers(nn.Module):
    """Constants with and without channels, kept and not kept in the state_dict."""

    pixel_mean: Tensor
    mean: Tensor
    mask: Tensor
    ramp: Tensor
    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 10), head(10)
        self.register_buffer("pixel_mean", torch.randn(3, 1, 1))
        self.register_buffer("mean", torch.randn(1, 8, 1, 1))
        self.register_buffer("mask", torch.rand(8, 1, 1).round(), persistent=True)
        self.register_buffer("ramp", torch.linspace(0, 1, 8), persistent=False)
        self.position = nn.Parameter(torch.randn(1, 10, 8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x - self.pixel_mean) - self.mean
        x = (x * (self.mask + 0.5)).relu() * self.ramp + torch.arange(8).view(1, 1, 8, 1) / 8
        return self.head(self.b(x) + self.position)


@case(images(), shrinks=("a",), frozen=("b",))
class ConstantsOfChannels(nn.Module):
    """Tensors that are made in the forward, one value a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * torch.linspace(0.5, 1, 8).view(8, 1, 1)
        x = self.b(x.relu()) + torch.arange(6)[None, :, None, None]
        return self.head(x + torch.ones_like(x) + x.new_zeros(6, 1, 1))


@case(images(), shrinks=("a", "kernels"), any_size=True)
class StandardisedWeights(nn.Module):
    """A weight that is computed before it is used (each filter by itself)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kernels, self.head = conv(3, 8), weight(10, 8, 3, 3), head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.a(x).relu(), self.kernels.tanh() * 2, padding=1).relu())


@case(images(), shrinks=("a", "last"))
class DynamicConvolution(nn.Module):
    """Kernels mixed anew for every sample, and applied as one grouped convolution over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.choose = conv(3, 6), conv(6, 8), nn.Linear(8, 3)
        self.kernels, self.last, self.head = nn.Parameter(torch.randn(3, 6, 8, 3, 3) / 6), conv(6, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        b, c, h, w = x.shape
        share = self.choose(x.mean((2, 3))).softmax(1)
        kernels = (share @ self.kernels.view(3, -1)).view(b * 6, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, 6, h, w)
        return self.head(self.last(y.relu()))
