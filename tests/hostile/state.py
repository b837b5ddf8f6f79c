"""Forwards that change what the next call sees: counters, lists, moving averages, caches."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, conv, hostile, images, middle, with_layers

KIND = "state"
SAYS = {"wanted": "said"}


# -- numbers and lists in Python ---------------------------------------------------------------------------------------


@middle(KIND, lambda: dict(calls=0))
def counts_its_calls(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x * 2


@hostile(KIND, **SAYS)
class ScalesByItsCalls(Net):
    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@middle(KIND, lambda: dict(ready=False), **SAYS)
def first_call_only(self: Any, x: Tensor) -> Tensor:
    if not self.ready:
        self.ready = True
        return x * 2
    return x


@middle(KIND, lambda: dict(last=None))
def keeps_its_activations(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return self.last * 2


@middle(KIND, lambda: dict(last=None), **SAYS)
def adds_its_last_activations(self: Any, x: Tensor) -> Tensor:
    given = x if self.last is None else x + self.last.mean((0, 2, 3), keepdim=True)
    self.last = given.detach()
    return given


@middle(KIND, lambda: dict(seen=[]))
def list_that_grows(self: Any, x: Tensor) -> Tensor:
    self.seen.append(x.detach().mean())
    return x * 2


@middle(KIND, lambda: dict(seen=[]), **SAYS)
def list_that_is_read(self: Any, x: Tensor) -> Tensor:
    self.seen.append(x.detach().abs().mean())
    return x / sum(self.seen[-3:])


@middle(KIND, lambda: dict(cache={}), **SAYS)
def key_value_cache(self: Any, x: Tensor) -> Tensor:
    """As in decoding: what was seen before takes part."""
    keys = x.mean((0, 3))[None]
    keys = torch.cat([self.cache["keys"], keys], 2) if "keys" in self.cache else keys
    self.cache["keys"] = keys.detach()
    return x * keys.mean(2)[..., None, None]


@hostile(KIND, **SAYS)
class CountsInItsClass(Net):
    total = 0

    def between(self, x: Tensor) -> Tensor:
        type(self).total = (type(self).total + 1) % 5
        return x * (type(self).total + 1)


@hostile(KIND, **SAYS)
def counts_in_a_closure() -> nn.Module:
    count = itertools.count(1)
    return Net(lambda self, x: x * next(count))


# -- buffers and parameters --------------------------------------------------------------------------------------------


def _buffers() -> dict[str, Any]:
    """A buffer of one number, and one of a number for each channel."""
    return {"calls": nn.Buffer(torch.zeros(())), "ema": nn.Buffer(torch.full((8,), 0.5))}


def _mean(x: Tensor) -> Tensor:
    return x.detach().mean((0, 2, 3))


def _reassigned(self: Any, x: Tensor) -> Tensor:
    self.ema = 0.9 * self.ema + 0.1 * _mean(x)
    return x - self.ema.view(1, -1, 1, 1)


def _by_data(self: Any, x: Tensor) -> Tensor:
    self.ema.data = self.ema * 0.9 + _mean(x) * 0.1
    return x - self.ema.view(1, -1, 1, 1)


def _after_use(self: Any, x: Tensor) -> Tensor:
    given = x - self.ema.view(1, -1, 1, 1)
    with torch.no_grad():
        self.ema[:] = self.ema * 0.5 + x.mean((0, 2, 3)) * 0.5
    return given


AVERAGES = {
    "scales_by_a_buffer": lambda self, x: x * self.calls.add_(1),
    "average_in_place": lambda self, x: x - self.ema.mul_(0.9).add_(_mean(x), alpha=0.1).view(1, -1, 1, 1),
    "average_by_copy": lambda self, x: x - self.ema.copy_(torch.lerp(self.ema, _mean(x), 0.1)).view(1, -1, 1, 1),
    "average_that_only_is_kept": lambda self, x: (self.ema.lerp_(_mean(x), 0.1), x * 2)[1],
    "average_reassigned": _reassigned,
    "average_by_data": _by_data,
    "average_after_use": _after_use,
}
with_layers(KIND, _buffers, AVERAGES, **SAYS)


@hostile(KIND, **SAYS)
class AverageOfTheInput(Net):
    """A moving statistic of the images, as normalisers of observations have it."""

    def __init__(self) -> None:
        super().__init__(mean=nn.Buffer(torch.zeros(3, 1, 1)), count=nn.Buffer(torch.ones(())))

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        self.mean += (x.mean((0, 2, 3))[:, None, None] - self.mean) * len(x) / self.count
        return super().forward(x - self.mean)


def _learns_in_eval(self: Any, x: Tensor) -> Tensor:
    """Batch statistics, and running ones that move, whatever the mode."""
    return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, training=True)


def _clips(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.c2.weight.clamp_(-0.05, 0.05)
    return x


def _norms() -> dict[str, Any]:
    return {
        "bn": nn.BatchNorm2d(8), "scale": nn.Parameter(torch.ones(8, 1, 1)),
        "each": nn.InstanceNorm2d(8, track_running_stats=True, affine=True),
    }  # fmt: skip


NORMS = {
    "norm_that_learns_in_eval": _learns_in_eval,
    "norm_kept_in_train_mode": lambda self, x: self.bn.train()(x),
    "instance_norm_with_running_statistics": lambda self, x: self.each(x),
    "changes_a_parameter": lambda self, x: (self.scale.data.mul_(1.5), x * self.scale)[1],
    "clips_its_weights": _clips,
}
with_layers(KIND, _norms, NORMS, **SAYS)


@middle(KIND, lambda: dict(bn=nn.BatchNorm2d(8, track_running_stats=False)))
def norm_without_running_statistics(self: Any, x: Tensor) -> Tensor:
    return self.bn(x)


@middle(KIND, lambda: dict(codes=nn.Buffer(torch.randn(6, 8)), used=nn.Buffer(torch.zeros(6))), **SAYS)
def code_book(self: Any, x: Tensor) -> Tensor:
    """The codes that were chosen are counted, and less used ones drift: vector quantisation as it is trained."""
    flat = x.permute(0, 2, 3, 1)
    chosen = (flat[..., None, :] - self.codes).square().sum(-1).argmin(-1)
    self.used.add_(F.one_hot(chosen, 6).float().mean((0, 1, 2)))
    self.codes.mul_(0.99)
    return x + (self.codes[chosen].permute(0, 3, 1, 2) - x).detach()


# -- what is made when it is first needed, and kept --------------------------------------------------------------------


@hostile(KIND)
class BufferMadeAtFirst(Net):
    ramp: Any = None

    def between(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0.5, 1, x.shape[-1])
        return x * self.ramp


@middle(KIND, lambda: dict(grids={}), wanted="any")
def cache_by_size(self: Any, x: Tensor) -> Tensor:
    key = (x.shape[2], x.shape[3])
    if key not in self.grids:
        self.grids[key] = torch.stack(torch.meshgrid(*(torch.arange(n) / n for n in key), indexing="ij")).sum(0)
    return x + self.grids[key]


@middle(KIND, lambda: dict(mask=None))
def cache_by_batch(self: Any, x: Tensor) -> Tensor:
    """The mask that is kept has the size of the first batch."""
    if self.mask is None or self.mask.shape[0] != x.shape[0]:
        self.mask = torch.linspace(0.5, 1, x.shape[0]).view(-1, 1, 1, 1)
    return x * self.mask


@middle(KIND, lambda: dict(positions=nn.Buffer(torch.zeros(0), persistent=False)))
def cache_that_grows(self: Any, x: Tensor) -> Tensor:
    """Positions are cached up to the longest seen, and cut."""
    if self.positions.shape[0] < x.shape[2]:
        self.positions = torch.arange(x.shape[2]) / 8
    return x + self.positions[: x.shape[2]]


@hostile(KIND, wanted="any")
class CacheByFunction(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * _ramp(x.shape[-1]) + self.offset

    @functools.cached_property
    def offset(self) -> float:
        return 0.5


@functools.lru_cache
def _ramp(size: int) -> Tensor:
    return torch.linspace(0.5, 1, size)


@middle(KIND, lambda: dict(scale=None), **SAYS)
def cache_of_activations(self: Any, x: Tensor) -> Tensor:
    """What the first batch gave is used for all that follow."""
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


def _ran(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net(images(6, 0))
    return net


@hostile(KIND)
def act_norm_that_ran() -> nn.Module:
    return _ran(ActNorm())


@hostile(KIND)
def lazy_layer_that_ran() -> nn.Module:
    return _ran(Net(lambda self, x: self.g(x), g=nn.LazyConv2d(8, 3, padding=1)))


@middle(KIND, wanted="any")
def layer_made_at_first(self: Any, x: Tensor) -> Tensor:
    """With weights that nothing random decides."""
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


@middle(KIND, lambda: dict(g=conv(8, 8)), wanted="any")
def put_back_after_use(self: Any, x: Tensor) -> Tensor:
    """A setting of a layer is changed for one call."""
    before = self.g.dilation, self.g.padding
    self.g.dilation = self.g.padding = (2, 2)
    try:
        return self.g(x)
    finally:
        self.g.dilation, self.g.padding = before
