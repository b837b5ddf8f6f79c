"""Mixtures of experts with stacked weights, and routers of several kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, case, tensors


def stacked(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[1] ** 0.5)


@case(tensors(5), shrinks=("inputs", "router", "up"))
@layers(lambda: dict(
    inputs=nn.Linear(5, 8), router=nn.Linear(8, 4), up=stacked(4, 8, 6), down=stacked(4, 6, 8),
    outputs=nn.Linear(8, CLASSES),
))  # fmt: skip
def ExpertsInOneProduct(self, x: Tensor) -> Tensor:
    """All experts compute all rows, and those that are not chosen weigh nothing."""
    x = self.inputs(x)
    weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
    spread = x.new_zeros(len(x), 4).scatter(1, chosen, weights)
    hidden = F.gelu(torch.einsum("bd,ndh->bnh", x, self.up))
    return self.outputs(torch.einsum("bnh,nhd->bd", hidden * spread.unsqueeze(-1), self.down))


@case(tensors(5), shrinks=("inputs", "router", "up"))
@layers(lambda: dict(
    inputs=nn.Linear(5, 8), router=nn.Linear(8, 4, bias=False), up=stacked(4, 8, 6), up_bias=stacked(4, 6),
    down=stacked(4, 6, 8), outputs=nn.Linear(8, CLASSES),
))  # fmt: skip
def ExpertsLookedUp(self, x: Tensor) -> Tensor:
    """The weights of the chosen experts are looked up for each row."""
    x = self.inputs(x)
    weights, chosen = self.router(x).topk(2, dim=-1)
    hidden = F.gelu(torch.einsum("bd,bkdh->bkh", x, self.up[chosen]) + self.up_bias[chosen])
    found = torch.einsum("bkh,bkhd->bkd", hidden, self.down[chosen])
    return self.outputs((found * weights.softmax(-1).unsqueeze(-1)).sum(1))


@case(tensors(5), shrinks=("inputs", "router", "up"))
@layers(lambda: dict(
    inputs=nn.Linear(5, 8), router=nn.Linear(8, 8), bias=nn.Buffer(torch.rand(8)), up=stacked(8, 8, 6),
    down=stacked(8, 6, 8), outputs=nn.Linear(8, CLASSES),
))  # fmt: skip
def ExpertsInGroups(self, x: Tensor) -> Tensor:
    """Experts are chosen by their scores and a bias, in the better of two groups, and weighed by the scores alone."""
    x = self.inputs(x)
    scores = self.router(x).sigmoid()
    choices = scores + self.bias
    best = choices.view(-1, 2, 4).topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1)[1]
    allowed = x.new_zeros(len(x), 2).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 2, 4).reshape(-1, 8)
    chosen = choices.masked_fill(~allowed.bool(), -torch.inf).topk(2, dim=-1)[1]
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = torch.einsum("bd,bkdh->bkh", x, self.up[chosen]).relu()
    return self.outputs(torch.einsum("bkh,bkhd->bd", hidden * weights.unsqueeze(-1), self.down[chosen]))
