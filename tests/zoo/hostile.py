"""Ordinary PyTorch that is hard to trace or easy to get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, head, images, tensors


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8), relu=nn.ReLU(inplace=True)))
def AliasedInPlace(self, x: Tensor) -> Tensor:
    """The identity is changed by the in-place activation before it is added."""
    x = self.a(x)
    identity = x
    y = self.c(self.relu(self.b(self.relu(x))))
    y += identity
    return self.head(y.mul_(identity))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
def WriteThroughView(self, x: Tensor) -> Tensor:
    """A slice is changed in place, and the tensor it came from is read afterwards."""
    x = self.a(x)
    x[:, 2:5].mul_(3).add_(1)
    y = self.b(x)
    y[:, :4].relu_()
    return self.head(y)


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
def WriteToSlice(self, x: Tensor) -> Tensor:
    """Part of the channels is overwritten by assignment (temporal shift)."""
    x = self.a(x).relu()
    out = torch.zeros_like(x)
    out[:, :2] = x[:, :2].roll(1, 2)
    out[:, 2:] = x[:, 2:]
    return self.head(self.b(out))


@case(images(), shrinks=("a", "b.0", "b.1", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 12), b=nn.ModuleList(conv(4, 4) for _ in range(2)), c=conv(12, 8), head=head(8)))
def LoopOverChunks(self, x: Tensor) -> Tensor:
    """Res2Net: the parts of a tensor are walked in a Python loop."""
    parts = list(self.a(x).relu().chunk(3, 1))
    out = [parts[0]]
    for layer, part in zip(self.b, parts[1:], strict=True):
        out.append(layer(part + out[-1]).relu())
    return self.head(self.c(torch.cat(out, 1)))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 12), b=conv(12, 8), head=head(8)))
def StarredShape(self, x: Tensor) -> Tensor:
    """A part of a shape is unpacked into the arguments of a view."""
    x = self.a(x).relu()
    b, c, *positions = x.shape
    x = x.view(b, 3, c // 3, *positions).transpose(1, 2).reshape(b, c, *x.shape[2:])
    return self.head(self.b(x))


@case(images(), shrinks=("a", "b", "c"))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8)))
def BranchOnShape(self, x: Tensor) -> Tensor:
    """Python decisions that depend on shapes only."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError("expected RGB images")
    x = self.a(x).relu()
    if x.shape[-1] == x.shape[-2] and x.size(1) == 8:
        x = self.b(x)
    for _ in range(x.shape[1] // 4):
        x = x + self.c(x).relu()
    return self.head(x)


@case(images(), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
def AssertOnShape(self, x: Tensor) -> Tensor:
    """An assertion that a symbolic trace records and that must not fail on the smaller model."""
    torch._assert(x.shape[1] == 3, "expected RGB images")
    x = self.b(self.a(x).relu())
    torch._assert(x.shape[1] == 8, "expected 8 channels")
    return self.head(x)


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(9, 8), head=head(8)))
def SpatialConstants(self, x: Tensor) -> Tensor:
    """Coordinates and types that depend on the input only."""
    y = self.a(x).relu()
    ramp = torch.ones_like(x[:, :1]).cumsum(2) / 8
    y = self.b(torch.cat([y, ramp.to(y.dtype)], 1).contiguous().clone())
    return self.head(y.to(y.device).detach() * 0.1 + y)


@case(tensors(6), shrinks=("a", "b"))
@layers(lambda: dict(a=nn.Linear(6, 12), b=nn.Linear(12, 12), head=nn.Linear(12, CLASSES)))
def KeywordsAndDefaults(self, x: Tensor) -> Tensor:
    """Arguments by keyword, None, and negative axes."""
    x = F.relu(input=self.a(input=x), inplace=False)
    x = torch.cat(tensors=torch.split(x, split_size_or_sections=6, dim=-1), dim=-1)
    return self.head(torch.add(input=self.b(x), other=x, alpha=0.5))


class Block(nn.Module):
    """A residual block whose forward takes a keyword and returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Tensor, *, skip: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).relu()
        return y + skip, y


@case(images(), shrinks=("a", "one.conv", "two.conv"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), one=Block(8), two=Block(8), head=head(16)))
def TupleBetweenModules(self, x: Tensor) -> Tensor:
    x = self.a(x)
    x, y = self.one(x, skip=x)
    x, z = self.two(x=x, skip=y)
    return self.head(torch.cat([x, z], 1))


@case(images(), shrinks=("forward_", "self_.0", "class-"), any_size=True)
class OddNames(nn.Module):
    """Names that are not identifiers, or that clash with what a graph module has."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_, self.self_ = conv(3, 8), nn.ModuleDict({"0": conv(8, 8), "act": nn.ReLU()})
        self.add_module("class-", conv(8, 6))
        self.graph_head, self.gain = head(6), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_["act"](self.self_["0"](self.forward_(x).relu()))
        return self.graph_head(getattr(self, "class-")(x) * self.gain)


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
def ChangesItsInput(self, x: Tensor) -> Tensor:
    """The batch itself is normalised in place."""
    x.sub_(0.5).mul_(2)
    return self.head(self.b(self.a(x).relu()))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
def ConvolvesItsOwnSum(self, x: Tensor) -> Tensor:
    """One node reads a value in two ways: as channels to sum over, and as positions to keep."""
    x = self.a(x).relu()
    gram = torch.einsum("bchw,bcij->bhwij", x, x).mean((1, 2, 3, 4))
    y = self.b(x)
    same = (y * y).sum((1, 2, 3)) + torch.matmul(y.flatten(2).transpose(1, 2), y.flatten(2)).mean((1, 2))
    return self.head(y) + (gram + same)[:, None] * 1e-3


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8)))
def AssignsInPlaces(self, x: Tensor) -> Tensor:
    """Positions, and channels with numbers, are overwritten by assignment."""
    x = self.a(x).relu()
    shifted = torch.zeros_like(x)
    shifted[:, :, 1:] = x[:, :, :-1]
    x = self.b(shifted)
    x[:, 2:5] = 0.5
    x = self.c(x)
    x[..., 0] = x[..., 1]
    return self.head(x)


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 6), head=head(10)))
def AssignsToBare(self, x: Tensor) -> Tensor:
    """Channels are written into a tensor that has none of its own, and is as wide as they are with four others."""
    x = self.b(self.a(x).relu())
    out = torch.ones(len(x), 10, *x.shape[2:], dtype=x.dtype, device=x.device)
    out[:, 2:8] = x
    return self.head(out)


@case(images(size=8), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=nn.Linear(8, 8), c=conv(8, 8), heads=nn.ModuleDict({"out": head(8), "aux": head(8)}),
))  # fmt: skip
def WindowsWithPadding(self, x: Tensor) -> dict[str, Tensor]:
    """Padded to whole windows, cut into them, put together again: sizes all the way, and a dict at the end."""
    x = self.a(x).relu().permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, (3 - w % 3) % 3, 0, (3 - h % 3) % 3))
    rows, columns = x.shape[1] // 3, x.shape[2] // 3
    x = x.view(b, rows, 3, columns, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
    x = self.b(x - x.mean(1, keepdim=True)).view(b, rows, columns, 3, 3, -1).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, rows * 3, columns * 3, -1)[:, :h, :w].permute(0, 3, 1, 2)
    assert x.shape[2:] == (h, w)
    return {name: part(self.c(x).relu()) for name, part in self.heads.items()}


@case(tensors(5, 6), shrinks=("weight", "b"))
@layers(lambda: dict(
    weight=nn.Parameter(torch.randn(6, 12)), bias=nn.Parameter(torch.zeros(12)), b=nn.Linear(12, 8),
    head=nn.Linear(8, CLASSES),
))  # fmt: skip
def ShapeAndLiteral(self, x: Tensor) -> Tensor:
    """The layer of GPT-2: its view takes the shape of its input with its own width put behind."""
    size = x.size()[:-1] + (12,)  # noqa: RUF005 - as it is written there
    x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)
    return self.head(self.b(x.relu()).relu().mean(1))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(3, 8), c=conv(8, 6, 1), scaled=nn.Linear(8, 6), empty=nn.Linear(8, 6), head=head(6),
))  # fmt: skip
def SizesInArithmetic(self, x: Tensor) -> Tensor:
    """Numbers, and shapes of new tensors, that follow from the channels and from the batch or the image together."""
    y = self.a(x).relu()
    n, channels, height, _ = y.shape
    z = (y / (channels + height)).mean((2, 3)) * y.numel() / (n * channels) ** 0.5 / channels
    z = self.scaled(z) + self.empty(y.new_zeros(y.shape).mean((2, 3)))
    return self.head(self.c(self.b(x) + y.new_ones(y.shape)) + z[:, :, None, None])
