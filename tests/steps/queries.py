"""Steps that ask a tensor about itself, and work with the answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from steps.kind import exactly, kind, pooled, spread

add = partial(kind, "queries")


def _asserted(_: Any, x: Tensor) -> Tensor:
    torch._assert(x.dim() == 4, "images have four axes")
    return x


add("size", lambda _, x: x.reshape(x.size(0), x.size(1), -1).view(x.size()))
add("torch.Tensor.size", lambda _, x: x.flatten(2).view(exactly(torch.Tensor.size, x)))
add("shape", lambda _, x: x.reshape(x.shape[0], -1).view(x.shape))
for _name in ("dim", "ndimension", "numel", "nelement"):
    add(_name, lambda _, x, name=_name: x * getattr(x, name)())
add("element_size", lambda _, x: x + 0 * x.element_size())  # the dtype of the network makes no difference
add("__len__", lambda _, x: x * exactly("__len__", x.transpose(0, 2)))
add("len", lambda _, x, function=len: x * exactly(function, x.transpose(0, 2)))  # tracing may replace the name
add("torch.numel", lambda _, x: x * torch.numel(x))
for _name in ("is_floating_point", "is_complex", "get_device"):
    add(_name, lambda _, x, name=_name: x * (getattr(x, name)() + 2))
add("is_contiguous", lambda _, x: x + 0 * x.is_contiguous())  # a single channel lies in any order
add("torch.is_floating_point", lambda _, x: x * (torch.is_floating_point(x) + 2))
add("attributes", lambda _, x: x.data * x.ndim + torch.zeros(1, dtype=x.dtype, device=x.device))
add("T", lambda _, x: x * spread(pooled(x).T.mT))
add("torch._assert", _asserted)
