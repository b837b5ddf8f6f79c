"""Multi-head attention that can be looked into: nn.MultiheadAttention's parameters, in operations that have rules."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.caller.overrides import changed
from fxprune.rules.attention import dot_product
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels
from fxprune.rules.table import rule


class ScaledDotProduct(nn.Module):
    """`F.scaled_dot_product_attention` with a fixed scale, and a dropout that follows the training mode."""

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., heads, length, head size) each; `mask` is added to the scores, or True where they count."""
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, rate, scale=self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` under the same parameter names, that can have fewer heads than embed_dim / head_dim.

    The number of heads follows from the widths of the projections; a head keeps its size and its scale.
    """

    attend: ScaledDotProduct
    bias_k: Tensor | None
    bias_v: Tensor | None

    @classmethod
    def lowered(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """A module that holds the parameters of `module`, to replace it."""
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        own.__dict__.update(module.__dict__)
        own._modules = dict(module._modules)
        del own.__dict__["num_heads"]
        own.attend = ScaledDotProduct(module.head_dim**-0.5, module.dropout)
        own.attend.training = module.training
        return own

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        """The number of heads that are left."""
        return int(self.out_proj.in_features) // int(self.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        q, k, v = (self._heads(x) for x in self._extended(*self._projected(query, key, value)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, q)
        attended: Tensor = self.attend(q, k, v, mask).movedim(-2, self._time(1)).flatten(-2)
        output: Tensor = self.out_proj(attended)
        if not need_weights:
            return output, None
        logits = (q * self.attend.scale) @ k.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(-1)
        return output, weights.mean(-3) if average_attn_weights else weights

    def _time(self, heads: int) -> int:
        """The axis of time of an unbatched or batched input, from its end or its start; `heads` axes come last."""
        return -2 - heads if self.batch_first else 0

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, by one product where they come from one tensor."""
        bias: Any = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            return q, k, v
        w_q: Any
        w_k: Any
        w_v: Any
        w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self._qkv_same_embed_dim:
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _extended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values followed by the learned ones, where the module has such."""
        if self.bias_k is None or self.bias_v is None:
            return q, k, v
        time = self._time(0)
        k, v = (
            torch.cat([x, torch.zeros_like(x.narrow(time, 0, 1)) + learned.flatten()], time)
            for x, learned in ((k, self.bias_k), (v, self.bias_v))
        )
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(..., heads, length, head size)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.movedim(self._time(1), -2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores, broadcast over heads."""
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(q.shape[:-2] + attn_mask.shape[-2:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q).unsqueeze(-2).unsqueeze(-2)
            attn_mask = padding if attn_mask is None else attn_mask + padding
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        return attn_mask if attn_mask is None or not added else F.pad(attn_mask, (0, added))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to scores; one of bools is True where they do not count."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def lower(model: nn.Module) -> nn.Module:
    """Replace every nn.MultiheadAttention in `model`, a copy of our own; returns the model."""
    lowered: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if _is_plain(child):
                lowered.setdefault(child, MultiheadAttention.lowered(child))
                parent._modules[name] = lowered[child]
    return lowered.get(model, MultiheadAttention.lowered(model) if _is_plain(model) else model)


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is an attention of torch that computes as its class says."""
    return type(module) is nn.MultiheadAttention and not changed(module, nn.MultiheadAttention)


@rule(ScaledDotProduct)
def dot_product_module(
    ctx: Context, module: nn.Module, query: Labels, key: Labels, value: Labels, mask: Labels | None = None
) -> Labels:
    """The attention of the module's inputs."""
    return dot_product(ctx, query, key, value, mask)
