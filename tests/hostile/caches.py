"""Things that a forward makes when it first needs them, and keeps."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hostile.case import Net, conv, hostile, images

KIND = "state"
SAYS = {"wanted": "said"}


@hostile(KIND)
class BufferMadeAtFirst(Net):
    ramp: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0.5, 1, x.shape[-1])
        return x * self.ramp


@hostile(KIND)
class BufferRegisteredAtFirst(Net):
    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.linspace(0.5, 1, x.shape[-1]), persistent=False)
        return x * self.ramp


@hostile(KIND)
class CacheBySize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[Any, Tensor] = {}

    def between(self, x: Tensor) -> Tensor:
        key = (x.shape[2], x.shape[3])
        if key not in self.grids:
            self.grids[key] = torch.stack(torch.meshgrid(*(torch.arange(n) / n for n in key), indexing="ij")).sum(0)
        return x + self.grids[key]


@hostile(KIND)
class CacheByBatch(Net):
    """The mask that is kept has the size of the first batch."""

    mask: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != x.shape[0]:
            self.mask = torch.linspace(0.5, 1, x.shape[0]).view(-1, 1, 1, 1)
        return x * self.mask


@hostile(KIND)
class CacheThatGrows(Net):
    """Positions are cached up to the longest seen, and cut."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.zeros(0), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        if self.positions.shape[0] < x.shape[2]:
            self.positions = torch.arange(x.shape[2]) / 8
        return x + self.positions[: x.shape[2]]


@hostile(KIND)
class CacheByFunction(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * _ramp(x.shape[-1]) + self.offset

    @functools.cached_property
    def offset(self) -> float:
        return 0.5


@functools.lru_cache
def _ramp(size: int) -> Tensor:
    return torch.linspace(0.5, 1, size)


@hostile(KIND, **SAYS)
class CacheOfActivations(Net):
    """What the first batch gave is used for all that follow."""

    scale: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.detach().abs().mean((0, 2, 3), keepdim=True)
        return x / self.scale


@hostile(KIND, **SAYS)
class ActNorm(Net):
    """Initialised by the first batch, as in flows; the flag is a buffer."""

    def __init__(self) -> None:
        super().__init__(shift=nn.Parameter(torch.zeros(8)), scale=nn.Parameter(torch.ones(8)))
        self.register_buffer("initialized", torch.tensor(0))

    def between(self, x: Tensor) -> Tensor:
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.shift.copy_(-x.mean((0, 2, 3)))
                self.scale.copy_(1 / x.std((0, 2, 3)))
            self.initialized.fill_(1)
        return (x + self.shift.view(1, -1, 1, 1)) * self.scale.view(1, -1, 1, 1)


@hostile(KIND)
class ActNormThatRan(ActNorm):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self(images(6, 0))


@hostile(KIND, **SAYS)
class ActNormByAFlag(ActNorm):
    done = False

    def between(self, x: Tensor) -> Tensor:
        if not self.done:
            self.shift.data = -x.detach().mean((0, 2, 3))
            self.done = True
        return x + self.shift.view(1, -1, 1, 1)


@hostile(KIND)
class LazyLayerThatRan(Net):
    def __init__(self) -> None:
        super().__init__(g=nn.LazyConv2d(8, 3, padding=1))
        with torch.no_grad():
            self(images(2, 0))

    def between(self, x: Tensor) -> Tensor:
        return self.g(x)


@hostile(KIND, wanted="any")
class LayerMadeAtFirst(Net):
    """With weights that nothing random decides."""

    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "g"):
            self.g = conv(x.shape[1], x.shape[1], bias=False)
            self.g.weight.data = torch.linspace(-1, 1, 576).view(8, 8, 3, 3).sin()
        return self.g(x)


@hostile(KIND)
class AttributeSetAndRead(Net):
    """The sizes of the input are left on the module for a part that runs later."""

    size: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x * self.size[-1] + torch.zeros(self.size[0], 1, 1, 1)


@hostile(KIND, wanted="any")
class PutBackAfterUse(Net):
    """A setting of a layer is changed for one call."""

    def __init__(self) -> None:
        super().__init__(g=conv(8, 8))

    def between(self, x: Tensor) -> Tensor:
        before = self.g.dilation, self.g.padding
        self.g.dilation = self.g.padding = (2, 2)
        try:
            return self.g(x)
        finally:
            self.g.dilation, self.g.padding = before
