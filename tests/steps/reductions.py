"""Steps that look across an axis: a statistic that scales the image, softmax and its like, orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.rules import reductions as rules
from steps.kind import back, exactly, kind, rows

add = partial(kind, "reductions")

_SINGLE = ("prod", "median", "max", "min", "argmax", "argmin", "all", "any", "nanmean", "nanmedian", "mode", "aminmax")
_FIRST = ("median", "max", "min", "var_mean", "std_mean", "nanmedian", "mode", "aminmax")  # several results
_TRUTHS = ("all", "any")
_SEVERAL = ("mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "logsumexp", "sum", "nansum")


def _statistic(call: Callable[..., Any], name: str, dim: Any) -> Callable[[Any, Tensor], Tensor]:
    """The image, scaled by a statistic of it along some axes."""

    def run(_: Any, x: Tensor) -> Tensor:
        of = x > 0 if name in _TRUTHS else x.contiguous() if name == "median" else x  # torch errs where x is expanded
        found = call(of, dim=dim, keepdim=True)
        return x * (found[0] if name in _FIRST else found).to(x)

    return run


for _name in sorted({*_SINGLE, *_SEVERAL}):
    _dim: Any = 2 if _name in _SINGLE else (2, 3)
    _spellings: dict[str, Any] = {f"torch.{_name}": getattr(torch, _name)}
    if hasattr(Tensor, _name):
        _spellings[_name] = partial(exactly, _name)
    for _title, _call in _spellings.items():
        add(_title, _statistic(_call, _name, _dim))
        add(f"{_title} over channels", _statistic(_call, _name, 1), whole=_name != "sum")
for _name in ("norm", "vector_norm"):
    add(f"torch.linalg.{_name}", _statistic(getattr(torch.linalg, _name), _name, (2, 3)))
for _title, _call in (("torch.kthvalue", torch.kthvalue), ("kthvalue", partial(exactly, "kthvalue"))):
    add(_title, lambda _, x, call=_call: x * call(x, 2, 2, True)[0])
    add(f"{_title} over channels", lambda _, x, call=_call: x * call(x, 1, dim=1, keepdim=True)[0], whole=True)
for _name in rules._LOSSES:
    _class = getattr(nn, f"{_name}Loss")
    add(f"nn.{_name}Loss", lambda layer, x: x * _lost(layer, x), lambda i, o, c=_class: c(), whole=True, alike=False)
for _function in rules._LOSS_FUNCTIONS:
    add(f"F.{_function.__name__}", lambda _, x, call=_function: x * _lost(call, x), whole=True, alike=False)


def _lost(call: Any, x: Tensor) -> Tensor:
    """A loss of images: of the classes of their places where that is what it takes."""
    kind = getattr(call, "__name__", type(call).__name__)
    classes = "nll" in kind.lower() or "cross_entropy" in kind or "CrossEntropy" in kind
    target = torch.zeros(x.shape[0], 6, 6, dtype=torch.int64) if classes and "with_logits" not in kind else x.sigmoid()
    return call(x, target)


_counted = partial(exactly, "count_nonzero")
for _title, _call in (("torch.count_nonzero", torch.count_nonzero), ("count_nonzero", _counted)):
    add(_title, lambda _, x, call=_call: x * call(x, (2, 3))[..., None, None])
add("torch.trapezoid", lambda _, x: x * torch.trapezoid(x, dim=3)[..., None])
for _title, _call in (("torch.renorm", torch.renorm), ("renorm", partial(exactly, "renorm"))):
    add(_title, lambda _, x, call=_call: call(x.transpose(0, 1), 2, 0, 0.5).transpose(0, 1))
    add(f"{_title} over channels", lambda _, x, call=_call: call(x, 2, 3, 0.5), whole=True)
add("renorm_", lambda _, x: x.clone().renorm_(2, 3, 0.5), whole=True)
add(
    "F.pairwise_distance",
    lambda _, x, y: x * F.pairwise_distance(x, y, keepdim=True) + 0 * F.pairwise_distance(x, y)[..., None],
    inputs=2,
)
add("mean over heights and channels", lambda _, x: x * x.mean((1, 2), keepdim=True), whole=True)
add("mean of all", lambda _, x: x * x.mean(), whole=True)
add("sum without its axis", lambda _, x: x * x.sum(1)[:, None].tanh())

_ALONG: dict[str, Callable[..., Tensor]] = {
    "torch.softmax": torch.softmax,
    "torch.log_softmax": torch.log_softmax,
    "F.softmax": F.softmax,
    "F.log_softmax": F.log_softmax,
    "F.softmin": F.softmin,
    "F.normalize": F.normalize,
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x, dim: x.log_softmax(dim),
    "torch.cumsum": torch.cumsum,
    "cumsum": lambda x, dim: x.cumsum(dim),
    "torch.sort": lambda x, dim: torch.sort(x, dim=dim)[0],
    "sort": lambda x, dim: x.sort(dim=dim)[0],
    "torch.topk": lambda x, dim: torch.topk(x, x.size(dim), dim=dim)[0],
    "topk": lambda x, dim: x.topk(x.size(dim), dim=dim)[0],
}
_ALONG |= {
    "torch.cumprod": torch.cumprod,
    "cumprod": lambda x, dim: x.cumprod(dim),
    "cumprod_": lambda x, dim: x.clone().cumprod_(dim),
    "cumsum_": lambda x, dim: x.clone().cumsum_(dim),
    "torch.cummax": lambda x, dim: torch.cummax(x, dim)[0],
    "cummax": lambda x, dim: x.cummax(dim)[0],
    "torch.cummin": lambda x, dim: torch.cummin(x, dim)[0],
    "cummin": lambda x, dim: x.cummin(dim)[0],
    "torch.logcumsumexp": torch.logcumsumexp,
    "logcumsumexp": lambda x, dim: x.logcumsumexp(dim),
    "torch.argsort": lambda x, dim: x * torch.argsort(x, dim=dim),
    "argsort": lambda x, dim: x * x.argsort(dim=dim),
}
_ORDERED = {*_ALONG} - {"torch.softmax", "torch.log_softmax", "softmax", "log_softmax", "F.normalize"}
_ORDERED -= {"F.softmax", "F.log_softmax", "F.softmin"}
for _title, _call in _ALONG.items():
    add(_title, lambda _, x, f=_call: f(x, dim=3))
    add(f"{_title} of channels", lambda _, x, f=_call: f(x, dim=1), whole=True, alike=_title not in _ORDERED)
for _class in (nn.Softmax, nn.LogSoftmax, nn.Softmin):
    add(f"nn.{_class.__name__}", lambda layer, x: layer(x), lambda i, o, c=_class: c(dim=2))
add("F.softmax of no axis", lambda _, x: F.softmax(x.flatten(2)).view_as(x))  # torch takes the first
add("topk, all in order", lambda _, x: x.topk(x.size(1), 1)[0], whole=True, alike=False)
add("topk of places", lambda _, x: x.topk(x.size(3), -1)[0])
add("sort of the last axis", lambda _, x: torch.sort(x)[0] + x.sort(descending=True)[0])
add("sort of rows", lambda _, x: back(rows(x).sort()[0]), whole=True, alike=False)
add("nn.Softmax2d", lambda layer, x: layer(x), lambda i, o: nn.Softmax2d(), whole=True)
add("F.gumbel_softmax", lambda _, x: F.gumbel_softmax(x, dim=1), whole=True, alike=False)
add("F.cosine_similarity", lambda _, x, y: x * F.cosine_similarity(x, y, dim=1)[:, None], inputs=2, whole=True)
