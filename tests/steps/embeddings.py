"""Steps that look rows of a table up by number."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import SIZE, back, drawn, kind, rows, spread

add = partial(kind, "embeddings")


def _numbers(x: Tensor) -> Tensor:
    """(N, C, 6, 6) -> (N, 36) numbers below 4."""
    return rows(x)[:, :, 0].sigmoid().mul(3.9).long()


def _table(i: int, o: int) -> nn.Module:
    return nn.Embedding(4, o)


add("nn.Embedding", lambda layer, x: back(layer(_numbers(x))), _table, width=drawn, alike=False)
add("F.embedding", lambda own, x: back(F.embedding(_numbers(x), own.weight)), _table, width=drawn, alike=False)
add(
    "nn.EmbeddingBag",
    lambda layer, x: spread(layer(_numbers(x))).expand(-1, -1, SIZE, SIZE) + x[:, :1],
    lambda i, o: nn.EmbeddingBag(4, o),
    width=drawn,
    alike=False,
)
add(
    "F.one_hot",
    lambda _, x: back(F.one_hot(_numbers(x), 4).to(x)),
    width=lambda i, o: 4,
    alike=False,
)


def _folded(fold: Any, x: Tensor) -> Tensor:
    """Patches of one row by two, that do not overlap in their columns."""
    return fold(F.avg_pool2d(x, (1, 2)).flatten(2))


_halved = {"width": lambda i, o: i // 2, "needs": lambda i: i % 2 == 0, "alike": False, "whole": True}
_patches = {"output_size": (SIZE, SIZE), "kernel_size": (1, 2), "stride": (1, 2)}
add("nn.Fold", _folded, lambda i, o: nn.Fold(**_patches), **_halved)
add("F.fold", lambda _, x: _folded(partial(F.fold, **_patches), x), **_halved)
