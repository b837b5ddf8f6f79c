"""States and sums that begin as tensors of one number, and are updated step by step."""

from __future__ import annotations

import torch
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, conv, tensors


@case(tensors(3, 3, 6, 6), shrinks=("a",))
@layers(lambda: dict(a=conv(3, 6), gates=conv(6 + 8, 4 * 8), head=nn.Linear(8, CLASSES)))
def ConvLSTM(self, x: Tensor) -> Tensor:
    """(N, steps, channels, 6, 6): the gates read the hidden state of the step before."""
    h = torch.zeros(x.shape[0], 8, 6, 6, dtype=x.dtype, device=x.device)
    c = x.new_zeros(x.shape[0], 8, *x.shape[3:])
    for step in range(3):
        i, f, o, g = self.gates(torch.cat([self.a(x[:, step]).relu(), h], 1)).split(8, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return self.head(h.mean((2, 3)))


@case(tensors(3, 3, 6, 6), shrinks=("new",))
@layers(lambda: dict(gates=conv(3 + 8, 16), new=conv(3 + 8, 8), head=nn.Linear(8, CLASSES)))
def ConvGRU(self, x: Tensor) -> Tensor:
    h = torch.full((x.shape[0], 8, 6, 6), 0.5, dtype=x.dtype, device=x.device)
    for step in range(3):
        z, r = self.gates(torch.cat([x[:, step], h], 1)).sigmoid().chunk(2, 1)
        h = (1 - z) * h + z * self.new(torch.cat([x[:, step], r * h], 1)).tanh()
    return self.head(h.mean((2, 3)))


@case(tensors(5, 6), shrinks=("i",))
@layers(lambda: dict(i=nn.Linear(6, 36), u=nn.Linear(12, 36), head=nn.Linear(12, CLASSES)))
def OwnGRU(self, x: Tensor) -> Tensor:
    """The equations of a GRU, written out; its state is one row for all samples."""
    h = torch.zeros(1, 12, dtype=x.dtype, device=x.device).expand(x.size(0), -1)
    for step in range(5):
        (xr, xz, xn), (hr, hz, hn) = self.i(x[:, step]).chunk(3, -1), self.u(h).chunk(3, -1)
        z = (xz + hz).sigmoid()
        h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
    return self.head(h)


@case(tensors(4, 6), shrinks=("i", "delta"))
@layers(lambda: dict(
    i=nn.Linear(6, 16), delta=nn.Linear(6, 16), b=nn.Linear(6, 4), c=nn.Linear(6, 4), head=nn.Linear(16, CLASSES),
    log=nn.Parameter(torch.randn(16, 4) / 4),
))  # fmt: skip
def SelectiveScan(self, x: Tensor) -> Tensor:
    """The recurrence of Mamba: a state of 4 numbers for each of 16 channels."""
    u, delta, b, c = self.i(x).relu(), self.delta(x).sigmoid(), self.b(x), self.c(x)
    state, out = torch.zeros((x.shape[0], 16, 4), dtype=x.dtype, device=x.device), []
    for step in range(4):
        decay = torch.exp(-delta[:, step, :, None] * self.log.exp())
        state = decay * state + (delta[:, step] * u[:, step])[:, :, None] * b[:, step, None]
        out.append((state @ c[:, step, :, None])[..., 0])
    return self.head(torch.stack(out, 1).mean(1))


@case(tensors(5, 6), shrinks=("a", "b", "d"))
@layers(lambda: dict(
    a=nn.Linear(6, 8), b=nn.Linear(6, 8), d=nn.Linear(6, 8), ends=nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))
))  # fmt: skip
def Sums(self, x: Tensor) -> Tensor:
    """Sums in place, an assignment to slots, and a tensor like an input that has no channels."""
    total = x.new_zeros(x.size(0), 8)
    for step in range(5):
        total += self.a(x[:, step]).tanh()
    rows = torch.empty(x.shape[0], x.shape[1], 8, dtype=x.dtype, device=x.device)
    rows[:, :] = self.b(x)
    wide = torch.cat([x, x[..., :2]], -1)
    like = torch.zeros_like(wide) + self.d(x)
    return sum(end(value) for end, value in zip(self.ends, (total, rows.mean(1), like.amax(1)), strict=True))


@case(tensors(6, 8), shrinks=("b", "c"))
@layers(lambda: dict(
    x=nn.Linear(8, 16), b=nn.Linear(8, 6), c=nn.Linear(8, 6), head=nn.Linear(16, CLASSES),
    scale=nn.Parameter(torch.rand(4)),
))  # fmt: skip
def SharedGroup(self, x: Tensor) -> Tensor:
    """Mamba-2: one group of state channels is repeated for all heads, whose sum runs over them."""
    n, length, _ = x.shape
    u = self.x(x).relu().view(n, length, 4, 4)
    b, c = (layer(x).view(n, length, 1, 6).repeat_interleave(4, 2) for layer in (self.b, self.c))
    scores = torch.einsum("nlhs,nmhs->nlmh", c, b) * self.scale
    return self.head(torch.einsum("nlmh,nmhp->nlhp", scores, u).flatten(2).mean(1))


@case(tensors(16, 6, 6), shrinks=("read", "out"))
@layers(lambda: dict(
    first=conv(16, 16), read=conv(16, 8, 1), kernel=conv(8, 4 * 9, 1), out=conv(16, 12), head=nn.Linear(12, CLASSES),
    windows=nn.Unfold(3, padding=1),
))  # fmt: skip
def Involution(self, x: Tensor) -> Tensor:
    """Kernels of every place, one for each of four groups of four channels."""
    y = self.first(x).relu()
    kernel = self.kernel(self.read(y).relu()).view(x.shape[0], 4, 9, 6, 6).unsqueeze(2)
    y = (kernel * self.windows(y).view(x.shape[0], 4, 4, 9, 6, 6)).sum(3).view(x.shape)
    return self.head(self.out(y).relu().mean((2, 3)))
