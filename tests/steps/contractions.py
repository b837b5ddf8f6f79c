"""Steps that are products of two tensors, with a raw parameter or with each other."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from steps.kind import Held, back, drawn, exactly, kind, matrix, pooled, rows, spread

add = partial(kind, "contractions")


def _vector(i: int, o: int) -> nn.Module:
    return Held(torch.randn(i))


def _bias(o: int) -> Tensor:
    return torch.zeros(o)


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    """The samples of x, each by a number."""
    return x * by.sigmoid()[:, None, None, None]


def _beside(own: nn.Module, x: Tensor) -> Tensor:
    """The weight once for every sample."""
    return own.weight.expand(x.size(0), -1, -1)


def _gram(product: object, x: Tensor) -> Tensor:
    """Positions by positions, and back to the channels."""
    weights = exactly(product, rows(x), x.flatten(2)).softmax(2)
    return back(exactly(product, weights, rows(x)))


for _product in (operator.matmul, torch.matmul, "matmul", "__matmul__"):
    _name = _product if isinstance(_product, str) else f"{_product.__module__}.{_product.__name__}"
    add(_name, lambda own, x, f=_product: back(exactly(f, rows(x), own.weight)), matrix, width=drawn)
    add(f"{_name} of two", lambda _, x, f=_product: _gram(f, x))
for _product in (torch.bmm, "bmm"):
    _name = _product if isinstance(_product, str) else "torch.bmm"
    add(_name, lambda _, x, f=_product: _gram(f, x))
    add(
        f"{_name} of a weight",
        lambda own, x, f=_product: back(exactly(f, rows(x), _beside(own, x))),
        matrix,
        width=drawn,
    )
for _product in (torch.mm, "mm"):
    _name = _product if isinstance(_product, str) else "torch.mm"
    add(
        _name,
        lambda own, x, f=_product: spread(exactly(f, pooled(x), own.weight)).expand(-1, -1, 6, 6),
        matrix,
        width=drawn,
    )
for _product in (torch.mv, "mv"):
    _name = _product if isinstance(_product, str) else "torch.mv"
    add(_name, lambda own, x, f=_product: _scaled(x, exactly(f, pooled(x), own.weight)), _vector)
for _product in (torch.addmm, "addmm"):
    _name = _product if isinstance(_product, str) else "torch.addmm"
    add(
        _name,
        lambda own, x, f=_product: spread(exactly(f, pooled(x), pooled(x), own.weight)).expand(-1, -1, 6, 6),
        lambda i, o: matrix(i, i),
    )
for _product in (torch.baddbmm, "baddbmm"):
    _name = _product if isinstance(_product, str) else "torch.baddbmm"
    add(
        _name, lambda own, x, f=_product: back(exactly(f, rows(x), rows(x), _beside(own, x))), lambda i, o: matrix(i, i)
    )
for _product in (torch.addbmm, "addbmm"):
    _name = _product if isinstance(_product, str) else "torch.addbmm"
    add(
        _name,
        lambda _, x, f=_product: (
            x * exactly(f, x.mean((0, 2, 3))[:, None], x.mean(3), x.mean(3).mT).mean(1)[:, None, None]
        ),
        whole=True,
    )
add("einsum", lambda own, x: torch.einsum("bchw,co->bohw", x, own.weight), matrix, width=drawn)
add(
    "einsum that names no output",
    lambda own, x: torch.einsum("bchw,cz", x, own.weight).permute(0, 3, 1, 2),
    matrix,
    width=drawn,
)
add("einsum of two", lambda _, x, y: torch.einsum("bchw,bcij,bchw->bchw", x, y, y), inputs=2)
add(
    "nn.Bilinear",
    lambda layer, x: back(layer(rows(x), rows(x))),
    lambda i, o: nn.Bilinear(i, i, o),
    width=drawn,
    whole=True,
)
add(
    "torch.bilinear",
    lambda own, x: back(torch.bilinear(rows(x), rows(x), own.weight, own.bias)),
    lambda i, o: nn.Bilinear(i, i, o),
    width=drawn,
    whole=True,
)
add(
    "torch.outer",
    lambda _, x: torch.outer(pooled(x)[0], x.mean((0, 2, 3))).mean(1)[None, :, None, None] * x,
    whole=True,
)
add("torch.inner", lambda _, x: torch.inner(rows(x), pooled(x)).mean(2)[:, None].unflatten(2, (6, 6)) * x)
add("inner", lambda _, x: rows(x).inner(pooled(x)).mean(2)[:, None].unflatten(2, (6, 6)) * x)
add("torch.dot", lambda _, x: torch.dot(x.mean((0, 2, 3)), x.amax((0, 2, 3))) * x)
add("dot", lambda _, x: x.mean((0, 2, 3)).dot(x.amax((0, 2, 3))) * x)
add("torch.linalg.vecdot", lambda _, x: torch.linalg.vecdot(x, x.tanh(), dim=1)[:, None] * x)
_OF_ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "outer": lambda x: pooled(x)[0].outer(x.mean((0, 2, 3))).mean(1)[None, :, None, None] * x,
    "cov": lambda x: x * pooled(x).T.cov().mean(),
    "torch.cov": lambda x: x * torch.cov(pooled(x).T).mean(),
    "torch.corrcoef": lambda x: x * torch.corrcoef(pooled(x).T + torch.arange(x.shape[0])).mean(),
    "torch.dist": lambda x: x * torch.dist(x, 2 * x),
}
add("torch.linalg.cross", lambda _, x: x * torch.linalg.cross(x[:, :3], x[:, 1:4], dim=1).mean(), alike=False)
for _title, _call in _OF_ALL.items():
    add(_title, lambda _, x, call=_call: call(x), whole=True)
add("torch.kron", lambda _, x: torch.kron(pooled(x)[:1], x.mean((0, 2, 3))[None]).mean() * x, whole=True)
add(
    "torch.tensordot",
    lambda own, x: back(torch.tensordot(rows(x), own.weight, dims=([2], [0]))),
    matrix,
    width=drawn,
    whole=True,
)
add("torch.cdist", lambda _, x: back(torch.cdist(rows(x), rows(x)).softmax(2) @ rows(x)), whole=True)
