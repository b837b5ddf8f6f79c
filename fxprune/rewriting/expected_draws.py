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


class Expected(TorchDispatchMode):
    """While it is on, nothing that is drawn is a matter of chance.

    In place of noise stands a half, or a likely number where a mean, a probability or a rate is given.
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
    """A likely number of an operation's: half a deviation above a mean, so that both count; a probability or a rate."""
    arguments = func._schema.arguments
    given = {a.name: args[at] if at < len(args) else a.default_value for at, a in enumerate(arguments)}
    if "std" in given:
        return given["mean"] + given["std"] / 2
    center = given.get("p", given["self"])
    return center.clone() if isinstance(center, Tensor) else center
