"""A mode without random draws: narrower tensors draw other numbers, so two models are compared without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_NOISE = frozenset({aten.rand, aten.rand_like, aten.randn, aten.randn_like, aten.uniform_, aten.exponential_})
_AROUND = frozenset({aten.normal, aten.normal_, aten.bernoulli, aten.bernoulli_, aten.poisson})


class Expected(TorchDispatchMode):
    """Replaces every random draw by a constant: 1/2, or a likely number where a mean, probability or rate is given.

    `drawn` tells whether there was any draw.
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
    """A likely draw of an operation: half a deviation above the mean, so that both count; a probability or a rate."""
    arguments = func._schema.arguments
    given = {a.name: args[at] if at < len(args) else a.default_value for at, a in enumerate(arguments)}
    if "std" in given:
        return given["mean"] + given["std"] / 2
    center = given.get("p", given["self"])
    return center.clone() if isinstance(center, Tensor) else center
