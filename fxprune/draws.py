"""Random numbers that a forward draws: narrower tensors draw others, so two models are compared without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_NOISE = frozenset({aten.rand, aten.rand_like, aten.randn, aten.randn_like, aten.uniform_, aten.exponential_})
_AROUND = frozenset({aten.normal, aten.normal_, aten.bernoulli, aten.bernoulli_, aten.poisson})
_CENTERS = ("mean", "p", "self")  # the arguments that say around what, the first that an operation has


class Expected(TorchDispatchMode):
    """While it is on, what is drawn is no matter of chance: a half in place of noise, or what it is drawn around.

    `drawn` tells whether anything was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operation."""
        del types
        kind = func.overloadpacket
        center = _center(func, args) if kind in _AROUND else 0.5
        found = func(*args, **(kwargs or {}))
        if kind in _AROUND or kind in _NOISE:
            self.drawn = True
            found.copy_(torch.as_tensor(center))
        return found


def _center(func: Any, args: Sequence[Any]) -> Any:
    """Around what an operation draws its numbers."""
    arguments = func._schema.arguments
    names = [argument.name for argument in arguments]
    at = next(names.index(name) for name in _CENTERS if name in names)
    center = args[at] if at < len(args) else arguments[at].default_value
    return center.clone() if isinstance(center, Tensor) else center
