"""What a step is, the table of all of them, and the few shapes that most of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

SIZE = 6  # of the images; every step keeps it
PLACES = SIZE * SIZE


def _same(inputs: int, drawn: int) -> int:
    return inputs


@dataclass(frozen=True)
class Kind:
    """What a step is: the layer that it makes of its input width, the width that it gives, and how it runs.

    ``width`` and ``layer`` take the input width and the drawn width; ``run`` takes the layer and the inputs, images of
    one width. ``alike`` says that it treats all channels alike, so that their order is nothing to it, and ``whole``
    that the channels that it reads have to stay.
    """

    family: str
    run: Callable[..., Tensor]
    layer: Callable[[int, int], nn.Module] | None = None
    width: Callable[[int, int], int] = _same
    needs: Callable[[int], bool] = lambda inputs: True
    inputs: int = 1
    alike: bool = True
    whole: bool = False


KINDS: dict[str, Kind] = {}


def kind(family: str, name: str, run: Callable[..., Tensor], layer: Any = None, **options: Any) -> None:
    """Add a step to the table; a second one of its name is an error."""
    if name in KINDS:
        raise ValueError(f"two steps are called {name}")
    KINDS[name] = Kind(family, run, layer, **options)


def drawn(inputs: int, drawn: int) -> int:
    return drawn


def even(inputs: int) -> bool:
    return inputs % 2 == 0


def apply(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


def rows(x: Tensor) -> Tensor:
    """(N, C, 6, 6) -> (N, 36, C)."""
    return x.flatten(2).transpose(1, 2)


def back(x: Tensor) -> Tensor:
    """(N, 36, C) -> (N, C, 6, 6)."""
    return x.transpose(1, 2).unflatten(2, (SIZE, SIZE))


def pooled(x: Tensor) -> Tensor:
    """(N, C, 6, 6) -> (N, C)."""
    return x.mean((2, 3))


def spread(x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1)."""
    return x[:, :, None, None]


class Held(nn.Module):
    """A parameter or a buffer that the step itself works with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.is_floating_point():
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)


def matrix(inputs: int, outputs: int) -> nn.Module:
    return Held(torch.randn(inputs, outputs) / inputs**0.5)


def exactly(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function or, by its name, a method; traced, it is a node of that very target."""
    tracer = next((arg.tracer for arg in args if isinstance(arg, fx.Proxy)), None)
    if tracer is not None:
        how = "call_method" if isinstance(target, str) else "call_function"
        return tracer.create_proxy(how, target, args, kwargs)
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
