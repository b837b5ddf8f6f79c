"""Layers spelled as functions of raw parameters, scale parameters, buffers in the forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, head, images, tensors


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[1] ** 0.5)


@case(images(), shrinks=("first", "second", "mean", "up", "last"), any_size=True)
@layers(lambda: dict(
    first=weight(8, 3, 3, 3), first_bias=nn.Parameter(torch.randn(8)), second=weight(12, 8, 3, 3),
    gain=nn.Parameter(torch.rand(12)), shift=weight(1, 12), up=weight(12, 6, 2, 2), slope=nn.Parameter(torch.rand(6)),
    last=weight(8, 3, 1, 1), head=head(8), mean=nn.Buffer(torch.randn(12)), var=nn.Buffer(torch.rand(12) + 0.5),
))  # fmt: skip
def FunctionalConv(self, x: Tensor) -> Tensor:
    x = F.conv2d(x, self.first, self.first_bias, padding=1).relu()
    x = torch.conv2d(x, self.second, stride=2)
    x = F.batch_norm(x, self.mean, self.var, self.gain, self.shift.flatten()).relu()
    x = F.prelu(F.conv_transpose2d(x, self.up, stride=2), self.slope)
    return self.head(F.conv2d(x, weight=self.last, groups=2).relu())


@case(tensors(6), shrinks=("first", "second", "third", "fourth", "fifth"))
@layers(lambda: dict(
    first=weight(12, 6), bias=nn.Parameter(torch.randn(12)), second=weight(12, 10), third=weight(10, 8),
    fourth=weight(14, 8), fifth=weight(14, 10), out=weight(10, CLASSES), final=nn.Parameter(torch.randn(CLASSES)),
))  # fmt: skip
def FunctionalLinear(self, x: Tensor) -> Tensor:
    x = F.linear(x, self.first, self.bias).relu()
    x = (x @ self.second).relu()
    x = torch.matmul(x, self.third).tanh()
    x = x.matmul(self.fourth.t()).relu()
    x = torch.mm(x, self.fifth).sigmoid()
    return torch.addmm(self.final, x, self.out)


@case(images(), shrinks=("first", "second", "third"), any_size=True)
@layers(lambda: dict(first=weight(8, 3), second=weight(8, 10), third=weight(12, 10), out=weight(12, CLASSES)))
def Einsums(self, x: Tensor) -> Tensor:
    x = torch.einsum("bchw,oc->bohw", x, self.first).relu()
    x = torch.einsum("bchw,cd->bdhw", x, self.second).relu()
    x = torch.einsum("oc,bc...->bo...", self.third, x).tanh()
    return torch.einsum("bc,cd->bd", x.mean((2, 3)), self.out)


@case(images(), shrinks=("a", "b", "gamma", "beta", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), gamma=nn.Parameter(torch.randn(8, 1, 1)), beta=nn.Parameter(torch.randn(1, 8, 1, 1)), b=conv(8, 10),
    scale=nn.Parameter(torch.randn(1, 10, 1, 1)), bias=nn.Parameter(torch.randn(10)), c=nn.Linear(10, 8),
    last=nn.Parameter(torch.randn(8)), temperature=nn.Parameter(torch.tensor(0.7)), head=nn.Linear(8, CLASSES),
))  # fmt: skip
def ScaleParameters(self, x: Tensor) -> Tensor:
    """Layer scale and bias in the shapes in which they are found."""
    x = self.a(x) * self.gamma + self.beta
    x = self.b(x.relu()).mul(self.scale) + self.bias.view(1, -1, 1, 1)
    x = self.c((x + self.bias[:, None, None]).permute(0, 2, 3, 1)) * self.last + self.last.exp()
    return self.head(x.mean((1, 2)) / self.temperature)


@case(images(), shrinks=("a", "b", "mean", "mask"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 10), head=head(10), pixel_mean=nn.Buffer(torch.randn(3, 1, 1)),
    mean=nn.Buffer(torch.randn(1, 8, 1, 1)), mask=nn.Buffer(torch.rand(8, 1, 1).round()),
    ramp=nn.Buffer(torch.linspace(0, 1, 8), persistent=False),
    position=nn.Parameter(torch.randn(1, 10, 8, 8), requires_grad=False),
))  # fmt: skip
def Buffers(self, x: Tensor) -> Tensor:
    """Constants with and without channels, kept and not kept in the state_dict."""
    x = self.a(x - self.pixel_mean) - self.mean
    x = (x * (self.mask + 0.5)).relu() * self.ramp + torch.arange(8).view(1, 1, 8, 1) / 8
    return self.head(self.b(x) + self.position)


@case(images(), shrinks=("a",), frozen=("b",))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 6), head=head(6)))
def ConstantsOfChannels(self, x: Tensor) -> Tensor:
    """Tensors that are made in the forward, one value a channel."""
    x = self.a(x) * torch.linspace(0.5, 1, 8).view(8, 1, 1)
    x = self.b(x.relu()) + torch.arange(6)[None, :, None, None]
    return self.head(x + torch.ones_like(x) + x.new_zeros(6, 1, 1))


@case(images(), shrinks=("a", "kernels"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), kernels=weight(10, 8, 3, 3), head=head(10)))
def StandardisedWeights(self, x: Tensor) -> Tensor:
    """A weight that is computed before it is used (each filter by itself)."""
    return self.head(F.conv2d(self.a(x).relu(), self.kernels.tanh() * 2, padding=1).relu())


@case(images(), shrinks=("a", "last"))
@layers(lambda: dict(
    a=conv(3, 6), b=conv(6, 8), choose=nn.Linear(8, 3), kernels=nn.Parameter(torch.randn(3, 6, 8, 3, 3) / 6),
    last=conv(6, 8), head=head(8),
))  # fmt: skip
def DynamicConvolution(self, x: Tensor) -> Tensor:
    """Kernels mixed anew for every sample, and applied as one grouped convolution over the whole batch."""
    x = self.b(self.a(x).relu()).relu()
    b, c, h, w = x.shape
    share = self.choose(x.mean((2, 3))).softmax(1)
    kernels = (share @ self.kernels.view(3, -1)).view(b * 6, c, 3, 3)
    y = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, 6, h, w)
    return self.head(self.last(y.relu()))
