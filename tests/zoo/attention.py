"""Attention in its many spellings, norms and tables: heads leave whole, a block's hidden units leave exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, conv, head, images, tensors

T, E, H = 5, 16, 4  # tokens, width, heads


class Block(nn.Module):
    """A pre-norm block around ``attention``, behind an embedding and in front of a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(6, E), nn.LayerNorm(E), attention
        self.second, self.mlp = nn.LayerNorm(E), nn.Sequential(nn.Linear(E, 20), nn.GELU(), nn.Linear(20, E))
        self.head = nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(self.second(x))
        return self.head(x.mean(1))


class Fused(nn.Module):
    """One projection for queries, keys and values, cut in one of several ways, and one of several products."""

    def __init__(self, cut: Callable[[Tensor], Any], attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.cut, self.attend = nn.Linear(E, 3 * E), nn.Linear(E, E), cut, attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.qkv(x))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def heads(x: Tensor) -> Tensor:
    b, t, _ = x.shape
    return x.view(b, t, H, E // H).transpose(1, 2)


def by_chunk(x: Tensor) -> Any:
    return (heads(part) for part in x.chunk(3, dim=-1))


def by_split(x: Tensor) -> Any:
    q, k, v = x.split([E, E, E], 2)
    return heads(q), heads(k), heads(v)


def by_permute(x: Tensor) -> Any:
    b, t, _ = x.shape
    qkv = x.reshape(b, t, 3, H, E // H).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def by_unbind(x: Tensor) -> Any:
    b, t, _ = x.shape
    return x.reshape(b, t, 3, H, E // H).permute(2, 0, 3, 1, 4).unbind(0)


def by_head_first(x: Tensor) -> Any:
    b, t, _ = x.shape
    return x.view(b, t, H, 3 * E // H).transpose(1, 2).chunk(3, -1)


def with_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul((torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(E // H)).softmax(-1), v)


def with_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.size(-1) ** -0.5 @ k.mT).softmax(dim=-1) @ v


def with_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v).view(b, h, t, d)


def with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q, k, v = (x.reshape(-1, t, d) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    return (scores.softmax(-1) @ v).view(b, h, t, d)


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def with_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


CUTS = {"chunk": by_chunk, "split": by_split, "permute": by_permute, "unbind": by_unbind, "head_first": by_head_first}
PRODUCTS = {
    "matmul": with_matmul, "operator": with_operator, "bmm": with_bmm, "baddbmm": with_baddbmm,
    "einsum": with_einsum, "function": with_function,
}  # fmt: skip
_SPELLINGS = [("chunk", name) for name in PRODUCTS] + [(name, "function") for name in CUTS if name != "chunk"]
for _cut, _product in [*_SPELLINGS, ("permute", "einsum")]:
    add(
        f"attention_{_cut}_{_product}",
        lambda cut=_cut, product=_product: Block(Fused(CUTS[cut], PRODUCTS[product])),
        tensors(T, 6),
        shrinks=("attention.qkv", "mlp.0"),
        frozen=("embed", "attention.out", "mlp.2"),
    )


class Shared(nn.Module):
    """Grouped-query attention: ``keys`` heads of keys and values for all the queries, in one of several spellings."""

    def __init__(self, keys: int, how: str) -> None:
        super().__init__()
        self.keys, self.how, d = keys, how, E // H
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, keys * d), nn.Linear(E, keys * d)
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        d, times = E // H, H // self.keys
        q = self.q(x).view(b, t, H, d).transpose(1, 2)
        k, v = (layer(x).view(b, t, self.keys, d).transpose(1, 2) for layer in (self.k, self.v))
        if self.how == "expand":
            k, v = (y[:, :, None].expand(b, self.keys, times, t, d).reshape(b, -1, t, d) for y in (k, v))
        elif self.how == "interleave":
            k, v = (y.repeat_interleave(times, dim=1) for y in (k, v))
        if self.how == "broadcast":
            y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "function")
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


for _keys, _how in (
    (2, "expand"),
    (2, "interleave"),
    (2, "function"),
    (1, "broadcast"),
    (1, "expand"),
    (1, "function"),
):
    add(
        f"shared_keys_{_keys}_{_how}",
        lambda keys=_keys, how=_how: Block(Shared(keys, how)),
        tensors(T, 6),
        shrinks=("attention.q", "mlp.0"),
        frozen=("embed", "attention.out"),
    )


class Multihead(nn.Module):
    """nn.MultiheadAttention, its first output."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {name: options.pop(name) for name in ("need_weights", "masked") if name in options}
        self.inner = nn.MultiheadAttention(E, H, **options)
        self.register_buffer("mask", torch.ones(T, T).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask if self.options.get("masked") else None
        y, _ = self.inner(x, x, x, attn_mask=mask, need_weights=self.options.get("need_weights", False))
        return y


for _name, _options in {
    "plain": {"batch_first": True},
    "weights": {"batch_first": True, "need_weights": True},
    "masked": {"batch_first": True, "masked": True},
    "extended": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    "no_bias": {"batch_first": True, "bias": False},
}.items():
    add(
        f"multihead_{_name}",
        lambda options=_options: Block(Multihead(**options)),
        tensors(T, 6),
        shrinks=("attention.inner.in_proj_weight", "mlp.0"),
        frozen=("embed", "attention.inner.out_proj"),
    )


def _two(batch: int = 2) -> tuple[Tensor, Tensor]:
    return tensors(T, 6)(batch), tensors(3, 10)(batch)


@case(_two, shrinks=("attention.q_proj_weight", "latent", "hidden"))
@layers(lambda: dict(
    latent=nn.Linear(6, E), hidden=nn.Linear(E, 12), attention=nn.MultiheadAttention(E, H, kdim=10, vdim=10),
    head=nn.Linear(12, CLASSES),
))  # fmt: skip
def CrossAttention(self, x: Tensor, y: Tensor) -> Tensor:
    """Queries from one input, keys and values of other widths from a second; time comes first; no norms."""
    y = y.transpose(0, 1)
    z = self.attention(self.latent(x).transpose(0, 1), y, y, need_weights=False)[0]
    return self.head(self.hidden(z.transpose(0, 1)).relu().mean(1))


@case(tensors(T, 6), shrinks=("attention.qkv", "mlp.0"), frozen=("embed",))
class RelativeBias(Block):
    """A bias for every head and distance from a table, and another from a small network, as in Swin."""

    def __init__(self) -> None:
        super().__init__(Fused(by_unbind, self._attend))
        self.table, self.small = nn.Parameter(torch.randn(2 * T - 1, H)), nn.Linear(1, H, bias=False)
        places = torch.arange(T)
        self.register_buffer("index", places[:, None] - places[None] + T - 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(T, T, -1).permute(2, 0, 1)
        other = self.small(self.index.unsqueeze(-1).type_as(q)).permute(2, 0, 1).sigmoid()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + other).unsqueeze(0))


@case(tensors(T, 6), shrinks=("attention.qkv",), frozen=("embed",))
class TalkingHeads(Block):
    """A linear layer over the heads between scores and softmax; cosine attention with a scale for every head."""

    def __init__(self) -> None:
        super().__init__(Fused(by_chunk, self._attend))
        self.talk, self.scale = nn.Linear(H, H), nn.Parameter(torch.rand(H, 1, 1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.exp()
        scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


@case(tensors(T, 6), shrinks=("attention.qkv", "mlp.0"), frozen=("embed",))
class RotatedHeads(Block):
    """Rotary positions and a norm of queries and keys over each head."""

    def __init__(self) -> None:
        super().__init__(Fused(by_unbind, self._attend))
        self.q_norm, self.k_norm = nn.RMSNorm(E // H), nn.LayerNorm(E // H)
        angle = torch.arange(T)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat((-x[..., half:], x[..., :half]), -1) * self.sin

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self._rotate(self.q_norm(q)), self._rotate(self.k_norm(k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case(images(), shrinks=("a", "qkv", "c"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), qkv=conv(8, 24, 1), c=conv(8, 6), head=head(6)))
def SingleHead(self, x: Tensor) -> Tensor:
    """Attention between the positions of a map with one head: places in it leave, there are no others."""
    x = self.a(x).relu()
    q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
    y = v @ (q.transpose(1, 2) @ k / 3).softmax(-1).transpose(1, 2)
    return self.head(self.c(y.view_as(x)).relu())


@case(images(), shrinks=("a", "qkv", "c"))
@layers(lambda: dict(a=conv(3, 8), qkv=conv(8, 48, 1), c=conv(16, 6), head=head(6)))
def ChannelAttention(self, x: Tensor) -> Tensor:
    """Attention between the channels of each head, as in cross-covariance attention."""
    b, _, h, w = x.shape
    q, k, v = self.qkv(self.a(x).relu()).reshape(b, 3, H, -1, h * w).unbind(1)
    y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
    return self.head(self.c(y.reshape(b, -1, h, w)).relu())


@case(tensors(T, 6), shrinks=("gate", "up", "both"), frozen=("embed", "down"))
@layers(lambda: dict(
    embed=nn.Linear(6, E), norm=nn.RMSNorm(E), head=nn.Linear(E, CLASSES), gate=nn.Linear(E, 20), up=nn.Linear(E, 20),
    down=nn.Linear(20, E), both=nn.Linear(E, 24), back=nn.Linear(12, E),
))  # fmt: skip
def GatedUnits(self, x: Tensor) -> Tensor:
    """SwiGLU with two layers, and with one that is cut in two."""
    x = self.embed(x)
    y = self.norm(x)
    x = x + self.down(F.silu(self.gate(y)) * self.up(y))
    one, two = self.both(self.norm(x)).chunk(2, -1)
    return self.head((x + self.back(F.gelu(one) * two)).mean(1))


@case(images(), shrinks=("a", "b", "c"), any_size=True)
@layers(lambda: dict(
    a=conv(3, 8), b=conv(8, 12), c=conv(12, 8), d=conv(8, 8), head=head(8), norm=nn.GroupNorm(4, 8),
    last=nn.GroupNorm(1, 8),
))  # fmt: skip
def GroupNorms(self, x: Tensor) -> Tensor:
    """Whole groups of channels leave; one group of all keeps its channels."""
    x = self.b(self.norm(self.a(x)).relu())
    x = self.c(F.group_norm(x, 3).relu()).relu()
    return self.head(self.last(self.d(x)).relu())


def _tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, T), generator=torch.Generator().manual_seed(batch))


@case(_tokens, shrinks=("words", "mix"))
@layers(lambda: dict(
    words=nn.Embedding(11, 8, padding_idx=0), places=nn.Parameter(torch.randn(1, T, 8)),
    first=nn.Parameter(torch.randn(1, 1, 8)), mix=nn.Linear(8, 12), head=nn.Linear(12, CLASSES),
    bag=nn.EmbeddingBag(11, 12),
))  # fmt: skip
def WordsAndPlaces(self, x: Tensor) -> Tensor:
    """Tables of words and places without a norm: their width is narrowed, the rows stay; tied to another layer."""
    y = self.words(x) + self.places
    y = torch.cat([self.first.expand(x.shape[0], -1, -1), y], 1)
    return self.head(self.mix(y).relu().mean(1) + self.bag(x))


@case(_tokens, shrinks=("mix",), frozen=("words",))
class TiedWords(nn.Module):
    """The table of words is the output layer, too: as many outputs as words, and the width goes on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.back = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x)
        return self.out(self.norm(y + self.back(self.mix(y).relu())))


@case(images(), shrinks=("a", "b"), any_size=True)
@layers(lambda: dict(a=conv(3, 8), b=conv(8, 6), head=nn.Linear(1, CLASSES)))
def Correlation(self, x: Tensor) -> Tensor:
    """Every place of one map against every place of another, over the root of the width as a tensor, as in RAFT."""
    y = self.b(self.a(x).relu())
    b, c, h, w = y.shape
    one, two = y.view(b, c, h * w), y.flip(3).reshape(b, c, h * w)
    volume = torch.matmul(one.transpose(1, 2), two) / torch.sqrt(torch.tensor(c).to(y.dtype))
    return self.head(volume.tanh().sum((1, 2)).unsqueeze(1))
