"""What removal has no exact meaning for: what it touches stays whole, the rest is pruned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images, tensors


@case(images(), shrinks=("a", "c"), frozen=("b",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8)))
def MeanOverChannels(self, x: Tensor) -> Tensor:
    x = self.b(self.a(x).relu())
    return self.head(self.c(x - x.mean(1, keepdim=True)).relu())


@case(images(), shrinks=("a", "c"), frozen=("b", "pick"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), pick=conv(2, 1, 7), c=conv(8, 8), head=head(8)))
def MaxOverChannels(self, x: Tensor) -> Tensor:
    """As in the spatial half of CBAM."""
    x = self.b(self.a(x).relu())
    seen = torch.cat([torch.mean(x, 1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], 1)
    return self.head(self.c(x * self.pick(seen).sigmoid()).relu())


@case(images(), shrinks=("a",), frozen=("b", "c"))
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 6), c=conv(8, 5), head=nn.Linear(30, CLASSES)))
def BilinearPooling(self, x: Tensor) -> Tensor:
    """The outer product of two maps over their positions, flattened."""
    x = self.a(x).relu()
    u, v = self.b(x).flatten(2), self.c(x).flatten(2)
    y = torch.bmm(u, v.transpose(1, 2)) / u.shape[-1]
    return self.head(F.normalize(y.flatten(1).sign() * y.flatten(1).abs().sqrt()))


@case(images(), shrinks=("a",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(1, 8), head=head(8)))
def SumOverChannels(self, x: Tensor) -> Tensor:
    """A sum reads a missing channel as zero."""
    return self.head(self.c(self.b(self.a(x).relu()).square().sum(1, keepdim=True)).relu())


for _name, _norm in {
    "group_norm": lambda: nn.GroupNorm(1, 8),
    "layer_norm": lambda: nn.LayerNorm([8, 8, 8]),
    "local_response_norm": lambda: nn.LocalResponseNorm(3),
    "softmax2d": nn.Softmax2d,
}.items():
    add(
        _name,
        lambda norm=_norm: nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8), norm(), nn.ReLU(), conv(8, 8), nn.ReLU(), head(8)
        ),
        images(),
        shrinks=("0", "5"),
        frozen=("2",),
    )


@case(images(), shrinks=("a", "c"), frozen=("b",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), norm=nn.LayerNorm(8), c=nn.Linear(8, 10), head=nn.Linear(10, CLASSES)))
def NormalisedOverChannels(self, x: Tensor) -> Tensor:
    x = self.b(self.a(x).relu()).permute(0, 2, 3, 1)
    x = F.normalize(self.norm(x), dim=-1) + F.layer_norm(x, (8,))
    return self.head(self.c(x).relu().mean((1, 2)))


@case(images(), shrinks=("a", "c"), frozen=("b",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 10), head=head(10)))
def OrderOfChannels(self, x: Tensor) -> Tensor:
    """Sorting and running sums mix the channels in a way that no deletion repeats."""
    x = self.b(self.a(x).relu())
    return self.head(self.c(torch.sort(x, dim=1)[0]).relu())


@case(images(size=4), shrinks=("a", "mlp.0"), frozen=("b", "mlp.2"))
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 12), norm=nn.LayerNorm(12), attention=nn.MultiheadAttention(12, 3, batch_first=True),
    mlp=nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)), head=nn.Linear(12, CLASSES),
))  # fmt: skip
def AttentionInside(self, x: Tensor) -> Tensor:
    """A transformer block on the positions of a map: its stream stays whole, its hidden layer does not."""
    x = self.b(self.a(x).relu()).flatten(2).transpose(1, 2)
    y = self.norm(x)
    x = x + self.attention(y, y, y, need_weights=False)[0]
    x = x + self.mlp(self.norm(x))
    return self.head(x.mean(1))


add(
    "transformer_layer",
    lambda: nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12),
        nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=True, activation="gelu"),
        nn.Linear(12, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5, CLASSES),
    ),
    tensors(5, 6),
    shrinks=("0", "3.linear1", "4"),
    frozen=("2",),
)  # fmt: skip


@case(images(), shrinks=("a", "c"), frozen=("b",), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8)))
def SoftmaxOverChannels(self, x: Tensor) -> Tensor:
    return self.head(self.c(self.b(self.a(x).relu()).softmax(1)).relu())
