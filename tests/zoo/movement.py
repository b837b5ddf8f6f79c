"""Operations that move channels about without changing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images, tensors


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
class VectorToMap(nn.Module):
    """A generator: a linear layer whose outputs are read as maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(6, 128), conv(8, 12), conv(12, 4), conv(4, 2)
        self.unflatten = nn.Unflatten(1, (3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(-1, 8, 4, 4).relu())
        x = self.unflatten(x).flatten(1, 2).unflatten(-1, (2, 2)).flatten(-2)
        return self.out(self.c(x))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
class ChannelsLast(nn.Module):
    """Linear layers on the channels of maps, with every spelling of the transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), nn.Linear(8, 12), conv(12, 8)
        self.d, self.norm, self.head = nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).permute(0, 2, 3, 1)).relu()
        x = self.c(torch.permute(x, (0, 3, 1, 2)).contiguous())
        x = self.d(torch.swapaxes(x.movedim(1, -1), 1, 2)).transpose(1, 3)
        x = self.norm(x.flatten(2)).transpose(-2, -1)
        return self.head(x.mean(dim=1))


@case(images(size=4), shrinks=("a", "b"))
class NhwcFlatten(nn.Module):
    """The channel is the fastest of the flattened axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(8 * 16, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().permute(0, 2, 3, 1)
        return self.head(self.b(x.reshape(x.shape[0], -1)).relu())


@case(images(size=4), shrinks=("a", "b"))
class ConcatFlatten(nn.Module):
    """Two maps of different width, joined and then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(3, 5), nn.Linear(13 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(torch.cat([self.a(x).relu(), self.b(x)], 1), 1))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
class ConcatSpellings(nn.Module):
    """Dense connections: each layer reads all that came before; one tensor is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3, 8), conv(8, 6), nn.BatchNorm2d(14)
        self.c, self.d, self.head = conv(14, 7), conv(7 + 6 + 8 + 3, 6), head(6 + 6 + 7)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a)
        c = self.c(self.norm(torch.cat((a, b), dim=1)).relu())
        d = self.d(torch.concat([c, b, a, x], -3))
        return self.head(torch.cat([d.relu(), d, c], 1))


@case(images(), shrinks=("a", "b"))
class ConcatOfPositions(nn.Module):
    """Joined along the height and along the batch: the channels are one another's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 8), conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.c(torch.cat([a, b], 2).relu()) + self.c(torch.cat([a, b], 3)).mean((2, 3), keepdim=True)
        both = self.head(self.c(torch.cat([a, b], 0)).relu())
        return both[: x.shape[0]] + self.head(y)


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class StackAndUnbind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(3, 8), conv(8, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.b(x).relu()], dim=1)
        first, second = y.unbind(1)
        z = torch.stack((self.c(first), self.d(second)), 0).sum(0)
        return self.head(z.relu() + y.sum(1))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
class SplitSpellings(nn.Module):
    """Even and uneven parts, each with a reader of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 12), conv(4, 6), conv(5, 10), conv(5, 7)
        self.e, self.f, self.head = conv(6, 8), conv(10, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        small, large, rest = torch.split(self.a(x).relu(), [4, 5, 3], dim=1)
        left, right = self.b(small).chunk(2, dim=1)
        halves = torch.chunk(self.c(large), 2, 1)
        d = self.d(halves[1]).split(3, 1)
        return self.head(self.e(torch.cat([left, right], 1)) + self.f(torch.cat([rest, d[0], d[2], d[1]], 1)))


@case(images(), shrinks=("a", "b"))
class SplitThenAdd(nn.Module):
    """The halves of one layer meet again: its channels go in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 16), conv(8, 12), head(4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        first, second, third = self.b(left * right.sigmoid()).tensor_split(3, dim=1)
        return self.head(first + second - third)


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class ChannelSlices(nn.Module):
    """Contiguous and strided slices, from both ends, and single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 12), conv(5, 12), conv(4, 10)
        self.d, self.e, self.head = conv(6, 8), conv(3, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a[:, 2:7])
        c = self.c(a[:, ::3])
        y = self.d(b[:, 1::2, :, :]) + self.e(c[:, -3:]) * a[:, 1:2]
        return self.head(y + c[:, 0].unsqueeze(1) + b.narrow(1, 4, 1) + b.select(1, 0)[:, None])


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class Permutation(nn.Module):
    """Channels picked by a constant list, by a buffer, and by index_select."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(5, 6), head(6)
        self.register_buffer("order", torch.tensor([6, 1, 7, 0, 3, 5, 2, 4]))
        self.register_buffer("some", torch.tensor([0, 7, 7, 2, 4]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()[:, [3, 0, 2, 1, 7, 6, 4, 5]])
        x = self.c(x[:, self.order].relu())
        return self.head(self.d(torch.index_select(x, 1, self.some)))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
class FlipAndRoll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).flip(1).relu())
        x = self.c(torch.roll(x, 3, dims=1))
        x = self.d(torch.flip(x, (1, 2)).roll(-2, 1))
        return self.head(torch.roll(x, (1, 2), (2, 3)))


@case(images(), shrinks=("a",), any_size=True)
class RollThenAdd(nn.Module):
    """A layer that meets its own rolled self: the channels form cycles."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(x + x.roll(4, 1) * x.flip(3))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class RepeatAndInterleave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 6), conv(12, 8), conv(16, 6), conv(12, 8)
        self.head, self.other = head(8), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).repeat(1, 2, 1, 1).relu())
        x = self.c(torch.repeat_interleave(x, 2, dim=1))
        return self.head(self.d(x.tile(1, 2, 1, 1).relu())) + self.other(x.repeat_interleave(2, 2))


@case(images(size=4), shrinks=("a", "b"))
class Expansion(nn.Module):
    """A vector spread over the positions, as in the image pooling branch of segmentation heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 8), nn.Linear(8, 6), conv(8, 6), conv(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x.mean((-1, -2)))[:, :, None, None]
        y = y.expand(-1, -1, x.size(2), x.size(3)) + y.expand(x.shape[0], 6, 4, 4)
        return self.out(torch.cat([y, self.c(x)], 1))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
class ZeroPaddedChannels(nn.Module):
    """Widened by zero channels before an addition, with several spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 10), conv(10, 13), head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x) + F.pad(x, (0, 0, 0, 0, 1, 3))
        zeros = torch.zeros_like(x[:, :3])
        return self.head(self.c(x) + torch.cat([zeros, x], 1))


@case(images(size=4), shrinks=("a", "b", "c"))
class SqueezeSpellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, CLASSES)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.pool(self.a(x)).squeeze(-1).squeeze(-1))
        x = self.c(x.unsqueeze(-1)).relu()
        return self.head(torch.squeeze(x, 2))


@case(images(), shrinks=("a", "b"), any_size=True)
class SizesOfChannels(nn.Module):
    """The number of channels used as a number: the smaller model must go on using the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x * x.shape[1] ** -0.5).relu()
        return self.head(x / x.size(1))


add(
    "pixel_shuffle_modules",
    lambda: nn.Sequential(
        conv(3, 24), nn.ReLU(), nn.PixelShuffle(2), conv(6, 8), nn.PixelUnshuffle(2), nn.ReLU(), conv(32, 6), head(6)
    ),
    images(),
    shrinks=("0", "3", "6"),
    any_size=True,
)


@case(images(), shrinks=("a", "b"), any_size=True)
class PixelShuffleFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.out = conv(3, 16), nn.BatchNorm2d(4), conv(4, 8), conv(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(F.pixel_shuffle(self.a(x), 2)).relu())
        return F.pixel_shuffle(self.out(torch.pixel_unshuffle(x, 2)), 2)


@case(images(size=4), shrinks=("a", "b"))
class SpaceToDepth(nn.Module):
    """Patches gathered by hand: view, permute, view; and the Focus slices of YOLOv5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 4), conv(16, 6), conv(24, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        x = self.b(x)
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.head(self.c(torch.cat(corners, 1)))


@case(images(size=4), shrinks=("a",))
class Unfold(nn.Module):
    """im2col: every channel becomes one row for each position of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), nn.Linear(6 * 4, 8), nn.Linear(8, CLASSES)
        self.unfold = nn.Unfold(2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.unfold(x) + F.unfold(x, 2, stride=2)
        return self.head(self.b(y.transpose(1, 2)).mean(1))
