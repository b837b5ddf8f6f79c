"""Steps that normalise by the statistics of one sample."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import apply, back, even, kind, rows

add = partial(kind, "norms")


def _by_rows(layer: nn.Module, x: Tensor) -> Tensor:
    return back(layer(rows(x)))


def _layer_norm(i: int, o: int) -> nn.Module:
    return nn.LayerNorm(i)


def _group_norm(i: int, o: int) -> nn.Module:
    return nn.GroupNorm(i // 2, i)


add("nn.LayerNorm", _by_rows, _layer_norm, whole=True)
add("nn.RMSNorm", _by_rows, lambda i, o: nn.RMSNorm(i), whole=True)
add("over positions", apply, lambda i, o: nn.LayerNorm([6, 6]))
for _home, _name in ((F, "F"), (torch, "torch")):
    add(
        f"{_name}.layer_norm",
        lambda own, x, home=_home: back(home.layer_norm(rows(x), own.normalized_shape, own.weight, own.bias)),
        _layer_norm,
        whole=True,
    )
    add(
        f"{_name}.rms_norm",
        lambda own, x, home=_home: back(home.rms_norm(rows(x), own.normalized_shape, own.weight, own.eps)),
        lambda i, o: nn.RMSNorm(i),
        whole=True,
    )
    add(
        f"{_name}.group_norm",
        lambda own, x, home=_home: home.group_norm(x, own.num_groups, own.weight, own.bias),
        _group_norm,
        needs=even,
        alike=False,
    )
add("nn.GroupNorm", apply, _group_norm, needs=even, alike=False)
add("one group", apply, lambda i, o: nn.GroupNorm(1, i), whole=True)
add("nn.LocalResponseNorm", apply, lambda i, o: nn.LocalResponseNorm(3), alike=False, whole=True)
add("nn.CrossMapLRN2d", apply, lambda i, o: nn.CrossMapLRN2d(3), alike=False, whole=True)
add("F.local_response_norm", lambda _, x: F.local_response_norm(x, 3), alike=False, whole=True)
