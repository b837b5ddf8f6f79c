"""Channels in groups: depthwise and grouped convolutions, shuffles, maxout, split attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import add, case, conv, head, images

add(
    "depthwise",
    lambda: nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 12, 1),
        conv(12, 24, groups=12), nn.ReLU(), conv(24, 10, 1), nn.ConvTranspose2d(10, 10, 2, 2, groups=10),
        nn.ConvTranspose2d(10, 20, 3, groups=10), nn.ReLU(), head(20),
    ),
    images(),
    shrinks=("0", "2", "3", "5", "6", "8", "9", "10"),
    any_size=True,
)  # fmt: skip
add(
    "depthwise1d",
    lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 24, 3, groups=8), nn.PReLU(24),
        nn.Conv1d(24, 6, 1), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(6, 5),
    ),
    images(dim=1),
    shrinks=("0", "1", "2", "3", "4"),
)  # fmt: skip
add(
    "depthwise3d",
    lambda: nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 16, 3, groups=8), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 8, 5),
    ),
    images(size=6, dim=3),
    shrinks=("0", "1", "2"),
)  # fmt: skip
add(
    "depthwise_of_the_image",
    lambda: nn.Sequential(conv(3, 12, groups=3), nn.ReLU(), conv(12, 8), nn.ReLU(), head(8)),
    images(),
    shrinks=("2",),
)
add(
    "grouped",
    lambda: nn.Sequential(
        conv(3, 16), nn.ReLU(), conv(16, 24, groups=4, bias=False), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 16, 1),
        nn.ReLU(), conv(16, 24, groups=2), nn.ReLU(), head(24),
    ),
    images(),
    shrinks=("0", "2", "3", "5", "7"),
    any_size=True,
)  # fmt: skip
add(
    "grouped_transposed",
    lambda: nn.Sequential(
        conv(3, 16), nn.ReLU(), nn.ConvTranspose2d(16, 24, 3, groups=4), nn.BatchNorm2d(24), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 2, 2, groups=2, bias=False), nn.ReLU(), head(16),
    ),
    images(),
    shrinks=("0", "2", "3", "5"),
)  # fmt: skip
add(
    "grouped_chain",
    lambda: nn.Sequential(
        conv(3, 24), conv(24, 24, groups=4), nn.ReLU(), conv(24, 24, groups=6), nn.ReLU(), conv(24, 48, groups=24),
        conv(48, 12, groups=2), nn.ReLU(), head(12),
    ),
    images(),
    any_size=True,
)  # fmt: skip


@case(images(), shrinks=("a", "reduce", "middle", "expand"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 12), norm=nn.BatchNorm2d(12), head=head(12), reduce=conv(12, 16, 1), middle=conv(16, 16, groups=4),
    expand=conv(16, 12, 1),
))  # fmt: skip
def ResnextBlock(self, x: Tensor) -> Tensor:
    x = self.norm(self.a(x)).relu()
    y = self.middle(self.reduce(x).relu()).relu()
    return self.head((x + self.expand(y)).relu())


@case(images(), shrinks=("a", "after"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 12), two=conv(12, 24, groups=2), three=conv(12, 24, groups=3), after=conv(24, 8), head=head(8),
))  # fmt: skip
def TwoGroupCounts(self, x: Tensor) -> Tensor:
    """Convolutions of two and of three groups whose outputs are added."""
    x = self.a(x).relu()
    return self.head(self.after(self.two(x) + self.three(x)))


@case(images(), shrinks=("a",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(3, 10), c=conv(18, 12, groups=3), head=head(12)))
def GroupedOfConcat(self, x: Tensor) -> Tensor:
    """The groups of the convolution do not fall together with the parts of the concatenation."""
    y = torch.cat([self.a(x), self.b(x)], 1)
    return self.head(self.c(y.relu()) + self.a(x).sum((1, 2, 3), keepdim=True))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """The channel shuffle of ShuffleNet, as torchvision spells it."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 12), b=conv(12, 8), c=conv(8, 12), d=conv(12, 8), head=head(8)))
def ChannelShuffle(self, x: Tensor) -> Tensor:
    """As view, transpose, view, with sizes and with literals, between plain convolutions."""
    x = self.b(shuffle(self.a(x).relu(), 3))
    x = self.c(x.reshape(x.shape[0], 2, 4, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2))
    x = x.reshape(x.size(0), 4, -1, x.size(2), x.size(3)).permute(0, 2, 1, 3, 4).reshape(x.shape)
    return self.head(self.d(x))


add(
    "channel_shuffle_module",
    lambda: nn.Sequential(
        conv(3, 12), nn.ReLU(), nn.ChannelShuffle(3), conv(12, 8), nn.ChannelShuffle(2), nn.ReLU(), head(8)
    ),
    images(),
    shrinks=("0", "3"),
)


class ShuffleBlock(nn.Module):
    """ShuffleNet v2: half of the channels pass by, then the halves are interleaved."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.expand, self.depthwise = conv(half, half, 1), conv(half, half, groups=half)
        self.project = conv(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = x.chunk(2, dim=1)
        y = self.project(self.depthwise(self.expand(y).relu())).relu()
        return shuffle(torch.cat((passed, y), dim=1), 2)


add(
    "shuffle_units",
    lambda: nn.Sequential(conv(3, 16), nn.ReLU(), ShuffleBlock(8), ShuffleBlock(8), conv(16, 12), head(12)),
    images(),
    shrinks=("0", "2.expand", "2.depthwise", "2.project", "3.expand", "3.project", "4"),
    any_size=True,
)
add(
    "shuffle_unit_twice",
    lambda: nn.Sequential(conv(3, 16), *[ShuffleBlock(8)] * 2, conv(16, 12), head(12)),
    images(),
    shrinks=("1.expand", "3"),
)


@case(images(), shrinks=("first", "last"), any_size=True)
@layers(lambda: dict(first=conv(3, 24), middle=conv(24, 24, groups=3), last=conv(24, 24, groups=3), head=head(24)))
def GroupedShuffle(self, x: Tensor) -> Tensor:
    """ShuffleNet v1: grouped convolution, shuffle, grouped convolution."""
    x = F.channel_shuffle(self.middle(self.first(x).relu()), 3)
    return self.head(self.last(x.relu()))


@case(images(), shrinks=("a", "b", "c", "d"), any_size=True)
@layers(lambda: dict(a=conv(3, 16), b=conv(8, 24), c=conv(8, 16), d=conv(8, 12), head=head(6)))
def Maxout(self, x: Tensor) -> Tensor:
    """The largest of k channels: all k go together; two layouts, three spellings."""
    x = self.a(x)
    x = x.view(x.size(0), 8, 2, x.size(2), x.size(3)).max(2)[0]
    x = self.b(x)
    x = x.reshape(x.size(0), 3, 8, x.size(2), x.size(3)).amax(dim=1)
    x = self.c(x).unflatten(1, (8, 2)).max(dim=2).values
    x = self.d(x)
    return self.head(torch.max(x[:, :6], x[:, 6:]))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 16), glu=nn.GLU(dim=1), b=conv(8, 16), c=conv(8, 12), head=head(6)))
def GatedLinearUnits(self, x: Tensor) -> Tensor:
    x = self.b(self.glu(self.a(x)))
    u, v = x.chunk(2, 1)
    return self.head(F.glu(self.c(u * torch.sigmoid(v)), 1))


@case(images(), shrinks=("a", "maps", "squeeze", "after"), any_size=True)
class SplitAttention(nn.Module):
    """ResNeSt: two copies of every channel, weighed against each other by a softmax over the copies."""

    def __init__(self, cardinality: int = 1) -> None:
        super().__init__()
        self.cardinality, self.a = cardinality, conv(3, 12)
        self.maps, self.norm = conv(12, 16, groups=2 * cardinality, bias=False), nn.BatchNorm2d(16)
        self.squeeze = nn.Conv2d(8, 6 * cardinality, 1, groups=cardinality)
        self.weigh = nn.Conv2d(6 * cardinality, 16, 1, groups=cardinality)
        self.after, self.head = conv(8, 8, 1), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.maps(self.a(x).relu())).relu()
        batch, wide = x.shape[:2]
        first, second = torch.split(x, wide // 2, dim=1)
        gap = F.adaptive_avg_pool2d(first + second, 1)
        weights = self.weigh(self.squeeze(gap).relu()).view(batch, self.cardinality, 2, -1).transpose(1, 2)
        weights = F.softmax(weights, dim=1).reshape(batch, -1).view(batch, -1, 1, 1)
        one, two = torch.split(weights, wide // 2, dim=1)
        return self.head(self.after((one * first + two * second).contiguous()))


add("split_attention_cardinality", lambda: SplitAttention(2), images(), shrinks=("a", "after"))


@case(images(), shrinks=("a", "maps", "after"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), maps=conv(8, 8), wide=conv(8, 8, 5), squeeze=nn.Linear(8, 4), weigh=nn.Linear(4, 16),
    after=conv(8, 8), head=head(8),
))  # fmt: skip
def SelectiveKernel(self, x: Tensor) -> Tensor:
    """SKNet: branches stacked on an axis of their own, weighed by a softmax over it."""
    x = self.a(x).relu()
    branches = torch.stack([self.maps(x), self.wide(x)], 1)
    weights = self.weigh(self.squeeze(branches.sum(1).mean((2, 3))).relu())
    weights = weights.view(-1, 2, 8).softmax(1)[..., None, None]
    return self.head(self.after((branches * weights).sum(dim=1)))
