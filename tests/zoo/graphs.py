"""Messages along edges, and other reads and writes at computed places; transforms along positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, images, tensors


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two edges for each of 6 nodes, (N, 12) both, chosen by the nodes' features."""
    source = x[..., :2].argsort(1).flatten(1)
    return source, source.roll(1, 1)


@case(tensors(6, 5), shrinks=("a", "b", "att"))
@layers(lambda: dict(a=nn.Linear(5, 12), b=nn.Linear(12, 8), att=nn.Linear(5, 8), head=nn.Linear(8, CLASSES)))
def MessagePassing(self, x: Tensor) -> Tensor:
    """Messages are gathered from sources, and added up, averaged, or their largest is taken, at targets."""
    source, target = _edges(x)
    h = self.a(x).relu()
    index = target[..., None]
    sent = h.gather(1, source[..., None].expand(-1, -1, h.size(-1)))
    h = torch.zeros(x.shape[0], 6, 12, dtype=x.dtype, device=x.device).scatter_add_(1, index.expand_as(sent), sent)
    h = self.b(h).relu() * self.att(x).sigmoid()
    sent = h[torch.arange(x.shape[0])[:, None], source]
    best = h.scatter_reduce(1, index.repeat(1, 1, h.shape[2]), sent, "amax")
    return self.head((best + h.scatter_reduce(1, index.expand(-1, -1, 8), sent, "mean")).mean(1))


@case(tensors(7, 5), shrinks=("a", "b", "c"))
@layers(lambda: dict(a=nn.Linear(5, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 6), head=nn.Linear(6, CLASSES)))
def WholeBatchAsOneGraph(self, x: Tensor) -> Tensor:
    """All nodes of a batch in one axis, with edges between neighbours; only some of them are kept by a mask."""
    h = self.a(x).flatten(0, 1)
    order = x[..., 0].flatten().argsort()
    h = h + torch.zeros_like(h).index_add_(0, order.roll(1), h.index_select(0, order))
    h = self.b(h.relu())
    h = h.index_copy(0, order[:2], 2 * h[order[:2]])
    h[x[..., 1].flatten() > 0] = 0.5
    h = self.c(h.index_put((order[:3],), h[order[3:6]], accumulate=True).relu())
    return self.head(h.view(*x.shape[:2], -1).mean(1) + h[x[..., 2].flatten() > -9].mean(0))


@case(images(size=8), shrinks=("a", "b", "c"), any_size=False)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), head=nn.Linear(6, CLASSES), gain=nn.Parameter(torch.rand(8, 1, 1)),
    mix=nn.Parameter(torch.randn(8, 8, 4, 4, 2) / 8),
))  # fmt: skip
def Spectra(self, x: Tensor) -> Tensor:
    """A global filter, and a Fourier layer that mixes channels with complex weights."""
    y = torch.fft.irfft2(torch.fft.rfft2(self.a(x)) * self.gain, s=(8, 8))
    low = torch.fft.rfft2(y.relu())[:, :, :4, :4]
    y = self.b(y) + torch.fft.irfft2(torch.einsum("nixy,ioxy->noxy", low, torch.view_as_complex(self.mix)), s=(8, 8))
    return self.head(self.c(F.relu(y)).mean((2, 3)))


@case(tensors(6, 5), shrinks=("a", "b", "c"))
@layers(lambda: dict(a=nn.Linear(5, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 6), head=nn.Linear(6, CLASSES)))
def AlongPositions(self, x: Tensor) -> Tensor:
    """Windows, products that run along, quantiles and triangular systems over positions."""
    h = self.a(x).unfold(1, 3, 1).mean(-1)
    h = self.b(h.sigmoid().cumprod(1) - h.quantile(0.25, dim=1, keepdim=True))
    lower = torch.tril(x[:, :4, :4]) / 4 + torch.eye(4, dtype=x.dtype, device=x.device)
    h = torch.linalg.solve_triangular(lower, torch.diff(h, dim=1, prepend=h[:, :1]), upper=False)
    return self.head(self.c(h.tanh()).mean(1))
