"""Operations that move channels about without changing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, head, images, tensors


@case(images(size=4), shrinks=("a", "b", "c", "d", "e", "f"))
class FlattenSpellings(nn.Module):
    """The step from maps to a vector, spelled with literals and with sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (conv(3, 8) for _ in range(6))
        self.flat = nn.Flatten()
        self.heads = nn.ModuleList(nn.Linear(8 * 16, CLASSES) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.e(x).relu()
        batch, channels, height, width = maps.shape
        flat = (
            self.flat(self.a(x)),
            torch.flatten(self.b(x).relu(), 1),
            self.c(x).view(x.size(0), -1),
            self.d(x).relu().view(-1, 8 * 4 * 4),
            maps.reshape(batch, channels * height * width),
            self.f(x).reshape((x.shape[0], 8, 16)).flatten(start_dim=1),
        )
        out = self.heads[0](flat[0])
        for linear, y in zip(self.heads[1:], flat[1:], strict=True):
            out = out + linear(y)
        return out


@case(tensors(6), shrinks=("a", "b", "c"))
@layers(lambda: dict(
    a=nn.Linear(6, 128), b=conv(8, 12), c=conv(12, 4), out=conv(4, 2), unflatten=nn.Unflatten(1, (3, 4)),
))  # fmt: skip
def VectorToMap(self, x: Tensor) -> Tensor:
    """A generator: a linear layer whose outputs are read as maps."""
    x = self.b(self.a(x).view(-1, 8, 4, 4).relu())
    x = self.unflatten(x).flatten(1, 2).unflatten(-1, (2, 2)).flatten(-2)
    return self.out(self.c(x))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=nn.Linear(8, 12), c=conv(12, 8), d=nn.Linear(8, 10), norm=nn.BatchNorm1d(10),
    head=nn.Linear(10, CLASSES),
))  # fmt: skip
def ChannelsLast(self, x: Tensor) -> Tensor:
    """Linear layers on the channels of maps, with every spelling of the transposition."""
    x = self.b(self.a(x).permute(0, 2, 3, 1)).relu()
    x = self.c(torch.permute(x, (0, 3, 1, 2)).contiguous())
    x = self.d(torch.swapaxes(x.movedim(1, -1), 1, 2)).transpose(1, 3)
    x = self.norm(x.flatten(2)).transpose(-2, -1)
    return self.head(x.mean(dim=1))


@case(images(size=4), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 8), b=nn.Linear(8 * 16, 12), head=nn.Linear(12, CLASSES)))
def NhwcFlatten(self, x: Tensor) -> Tensor:
    """The channel is the fastest of the flattened axes."""
    x = self.a(x).relu().permute(0, 2, 3, 1)
    return self.head(self.b(x.reshape(x.shape[0], -1)).relu())


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 6), norm=nn.BatchNorm2d(14), c=conv(14, 7), d=conv(7 + 6 + 8 + 3, 6), head=head(6 + 6 + 7),
))  # fmt: skip
def ConcatSpellings(self, x: Tensor) -> Tensor:
    """Dense connections: each layer reads all that came before; one tensor is there twice."""
    a = self.a(x).relu()
    b = self.b(a)
    c = self.c(self.norm(torch.cat((a, b), dim=1)).relu())
    d = self.d(torch.concat([c, b, a, x], -3))
    return self.head(torch.cat([d.relu(), d, c], 1))


@case(images(), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), head=head(6)))
def ConcatOfPositions(self, x: Tensor) -> Tensor:
    """Joined along the height and along the batch: the channels are one another's."""
    a, b = self.a(x), self.b(x)
    y = self.c(torch.cat([a, b], 2).relu()) + self.c(torch.cat([a, b], 3)).mean((2, 3), keepdim=True)
    both = self.head(self.c(torch.cat([a, b], 0)).relu())
    return both[: x.shape[0]] + self.head(y)


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(3, 8), c=conv(8, 8), d=conv(8, 8), head=head(8)))
def StackAndUnbind(self, x: Tensor) -> Tensor:
    y = torch.stack([self.a(x), self.b(x).relu()], dim=1)
    first, second = y.unbind(1)
    z = torch.stack((self.c(first), self.d(second)), 0).sum(0)
    return self.head(z.relu() + y.sum(1))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 12), b=conv(4, 6), c=conv(5, 10), d=conv(5, 7), e=conv(6, 8), f=conv(10, 8), head=head(8),
))  # fmt: skip
def SplitSpellings(self, x: Tensor) -> Tensor:
    """Even and uneven parts, each with a reader of its own."""
    small, large, rest = torch.split(self.a(x).relu(), [4, 5, 3], dim=1)
    left, right = self.b(small).chunk(2, dim=1)
    halves = torch.chunk(self.c(large), 2, 1)
    d = self.d(halves[1]).split(3, 1)
    return self.head(self.e(torch.cat([left, right], 1)) + self.f(torch.cat([rest, d[0], d[2], d[1]], 1)))


@case(images(), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 16), b=conv(8, 12), head=head(4)))
def SplitThenAdd(self, x: Tensor) -> Tensor:
    """The halves of one layer meet again: its channels go in pairs."""
    left, right = self.a(x).chunk(2, 1)
    first, second, third = self.b(left * right.sigmoid()).tensor_split(3, dim=1)
    return self.head(first + second - third)


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 12), b=conv(5, 12), c=conv(4, 10), d=conv(6, 8), e=conv(3, 8), head=head(8)))
def ChannelSlices(self, x: Tensor) -> Tensor:
    """Contiguous and strided slices, from both ends, and single channels."""
    a = self.a(x).relu()
    b = self.b(a[:, 2:7])
    c = self.c(a[:, ::3])
    y = self.d(b[:, 1::2, :, :]) + self.e(c[:, -3:]) * a[:, 1:2]
    return self.head(y + c[:, 0].unsqueeze(1) + b.narrow(1, 4, 1) + b.select(1, 0)[:, None])


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(5, 6), head=head(6),
    order=nn.Buffer(torch.tensor([6, 1, 7, 0, 3, 5, 2, 4])),
    some=nn.Buffer(torch.tensor([0, 7, 7, 2, 4]), persistent=False),
))  # fmt: skip
def Permutation(self, x: Tensor) -> Tensor:
    """Channels picked by a constant list, by a buffer, and by index_select."""
    x = self.b(self.a(x).relu()[:, [3, 0, 2, 1, 7, 6, 4, 5]])
    x = self.c(x[:, self.order].relu())
    return self.head(self.d(torch.index_select(x, 1, self.some)))


@case(images(), shrinks=("a",), any_size=True)
@layers(lambda: dict(a=conv(3, 12), head=head(12)))
def RollThenAdd(self, x: Tensor) -> Tensor:
    """A layer that meets its own rolled self: the channels form cycles."""
    x = self.a(x).relu()
    return self.head(x + x.roll(4, 1) * x.flip(3))


@case(images(size=4), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 8), b=nn.Linear(8, 6), c=conv(8, 6), out=conv(12, 2)))
def Expansion(self, x: Tensor) -> Tensor:
    """A vector spread over the positions, as in the image pooling branch of segmentation heads."""
    x = self.a(x).relu()
    y = self.b(x.mean((-1, -2)))[:, :, None, None]
    y = y.expand(-1, -1, x.size(2), x.size(3)) + y.expand(x.shape[0], 6, 4, 4)
    return self.out(torch.cat([y, self.c(x)], 1))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 6), b=conv(6, 10), c=conv(10, 13), head=head(13)))
def ZeroPaddedChannels(self, x: Tensor) -> Tensor:
    """Widened by zero channels before an addition, with several spellings."""
    x = self.a(x).relu()
    x = self.b(x) + F.pad(x, (0, 0, 0, 0, 1, 3))
    zeros = torch.zeros_like(x[:, :3])
    return self.head(self.c(x) + torch.cat([zeros, x], 1))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 12), head=head(12)))
def SizesOfChannels(self, x: Tensor) -> Tensor:
    """The number of channels used as a number: the smaller model must go on using the old one."""
    x = self.a(x).relu()
    x = self.b(x * x.shape[1] ** -0.5).relu()
    return self.head(x / x.size(1))


@case(images(size=4), shrinks=("a", "b"))
@layers(lambda: dict(a=conv(3, 4), b=conv(16, 6), c=conv(24, 8), head=head(8)))
def SpaceToDepth(self, x: Tensor) -> Tensor:
    """Patches gathered by hand: view, permute, view; and the Focus slices of YOLOv5."""
    x = self.a(x).relu()
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, c * 4, h // 2, w // 2)
    x = self.b(x)
    corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    return self.head(self.c(torch.cat(corners, 1)))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), head=head(8)))
def FlipAndRoll(self, x: Tensor) -> Tensor:
    x = self.b(self.a(x).flip(1).relu())
    x = self.c(torch.roll(x, 3, dims=1))
    x = self.d(torch.flip(x, (1, 2)).roll(-2, 1))
    return self.head(torch.roll(x, (1, 2), (2, 3)))
