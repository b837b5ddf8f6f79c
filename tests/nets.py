"""Small networks written as their forward alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def layers(make: Callable[[], dict[str, Any]]) -> Callable[[Callable[..., Any]], type[nn.Module]]:
    """Make a forward the class of a network with these layers, parameters, buffers and plain attributes."""

    def network(forward: Callable[..., Any]) -> type[nn.Module]:
        def made(self: nn.Module) -> None:
            nn.Module.__init__(self)
            for name, value in make().items():
                setattr(self, name, value)

        names = {name: getattr(forward, name) for name in ("__doc__", "__module__", "__qualname__")}
        return type(forward.__name__, (nn.Module,), names | {"__init__": made, "forward": forward})

    return network
