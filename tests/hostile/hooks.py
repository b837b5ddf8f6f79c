"""Hooks that change values, forwards that are set on an instance, and subclasses that compute in other places."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Deep, Net, Steps, changed, conv, hostile, masked, with_layers

KIND = "hooks"


def _doubled(module: Any, args: Any, out: Tensor) -> Tensor:
    return out * 2 + 1


def _input_in_place(module: Any, args: Any) -> None:
    args[0].mul_(3)


def _with_keywords(module: Any, args: Any, kwargs: Any) -> Any:
    return tuple(arg * 3 for arg in args), {name: value * 3 for name, value in kwargs.items()}


def _prepended(net: Any) -> None:
    net.c1.register_forward_hook(lambda module, args, out: out + 1)
    net.c1.register_forward_hook(lambda module, args, out: out * 2, prepend=True)


def _of_gradients(net: Any) -> None:
    net.c2.register_full_backward_hook(lambda module, given, taken: None)
    net.f.weight.register_hook(lambda grad: grad * 2)
    net.register_state_dict_post_hook(lambda module, state, prefix, meta: None)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "on_a_container": lambda net: net.block.register_forward_hook(_doubled),
    "on_a_norm": lambda net: net.bn.register_forward_hook(_doubled),
    "in_place_before": lambda net: net.act.register_forward_pre_hook(_input_in_place),
    "twice": _prepended,
    "removed": lambda net: net.c1.register_forward_hook(_doubled).remove(),
    "that_observes": lambda net: net.block.register_forward_hook(lambda module, args, out: None),
    "of_gradients": _of_gradients,
    "before_a_layer_with_keywords": lambda net: net.c2.register_forward_pre_hook(_with_keywords, with_kwargs=True),
    "before_a_layer_a_bare_value": lambda net: net.c2.register_forward_pre_hook(lambda module, args: args[0] * 2),
}  # fmt: skip
changed(KIND, {f"hook_{name}": change for name, change in HOOKS.items()})


@hostile(KIND)
class HookOfItsOwn(Deep):
    """A model that registers hooks on its layers to read what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.block.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, out: Tensor) -> None:
        self.features["block"] = out

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.features["block"].mean((1, 2, 3))[:, None]


@hostile(KIND)
class HookBypassed(Deep):
    """Called by its forward, a layer runs without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.c1.register_forward_hook(_doubled)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.c1.forward(x) + nn.Conv2d.forward(self.c1, x))
        return self.f(self.c2(self.block.forward(self.act(x))).relu().mean((2, 3)))


@hostile(KIND)
def hook_on_a_shared_layer() -> nn.Module:
    """One layer at two places, with one hook."""
    g = conv(8, 8)
    g.register_forward_hook(_doubled)
    return Net(lambda self, x: self.again(self.g(x).relu()), g=g, again=g)


@hostile(KIND, masked)
def hook_that_changes_a_mask() -> nn.Module:
    net = Steps(lambda _, h, mask: h * mask[..., None])
    net.register_forward_pre_hook(lambda module, args: (args[0], 1 - args[1]))
    return net


# -- forwards set on an instance ---------------------------------------------------------------------------------------


def _closure(net: Any, name: str) -> None:
    layer = net.get_submodule(name)
    old = layer.forward
    layer.forward = lambda x: old(x) * 2


class Caller:
    """Not a function, but called as one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, x) * 2


def _scaled(self: Any, x: Tensor, scale: float = 2.0) -> Tensor:
    return type(self).forward(self, x) * scale


def _set(layer: Any, forward: Any) -> None:
    layer.forward = forward


def _decorated(net: Any) -> None:
    old = net.c1.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return old(*args, **kwargs).abs()

    net.c1.forward = forward


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "partial_on_the_root": lambda net: _set(net, functools.partial(_scaled, net, scale=3.0)),
    "closure_on_a_container": lambda net: _closure(net, "block"),
    "closure_over_the_model": lambda net: _set(net.c2, lambda x: F.conv2d(x, net.c2.weight, padding=1) * 2),
    "decorated": _decorated,
    "object": lambda net: _set(net.c1, Caller(net.c1)),
    "of_another_layer": lambda net: _set(net.act, nn.Tanh().forward),
    "of_a_layer_of_the_model": lambda net: _set(net.act, nn.Sequential(conv(8, 8)).forward),
    "without_gradients": lambda net: _set(net.c1, torch.no_grad()(net.c1.forward)),
    "call_on_an_instance": lambda net: setattr(net.c1, "__call__", lambda x: x * 0),
}
changed(KIND, {f"forward_{name}": change for name, change in FORWARDS.items()})


# -- subclasses that compute in other places than the layer does -------------------------------------------------------


class ConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class ReadsTwice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x.square(), self.weight, None, padding=1)


class ReadsTransposed(nn.Conv2d):
    """Square: the weight is read along both of its axes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(super().forward(x), self.weight.transpose(0, 1), None, padding=1)


class WeightByGetattribute(nn.Conv2d):
    """Whoever asks the layer for its weight gets another one than its state_dict has."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found * 2 if name == "weight" else found


class Padded(nn.Conv2d):
    """A padding that the constructor does not know of."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.padding_mode, self._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


class Changes(nn.Conv2d):
    """Its dilation is set when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.dilation = self.padding = (2, 2)
        return super().forward(x)


class LeakyByCall(nn.ReLU):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) - 0.1 * super().__call__(-x)


class ResidualByCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return x + super().__call__(x)


class NormOfItsOwn(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean * 2, self.running_var, self.weight, self.bias)


def _of_another_class() -> nn.Module:
    """A layer that becomes of another class after it was made."""
    layer = conv(8, 8)
    layer.__class__ = ConvForward
    return layer


def _subclasses() -> dict[str, Any]:
    kinds = (ReadsTwice, ReadsTransposed, WeightByGetattribute, Padded, Changes)
    found = {kind.__name__: kind(8, 8, 3, padding=1) for kind in kinds}
    found |= {"LeakyByCall": LeakyByCall(), "NormOfItsOwn": NormOfItsOwn(8)}
    return found | {"sequential": ResidualByCall(conv(8, 8), nn.ReLU()), "of_another_class": _of_another_class()}


for _name in _subclasses():
    with_layers(KIND, lambda name=_name: {"g": _subclasses()[name]}, {f"subclass_{_name}": lambda self, x: self.g(x)})


@hostile(KIND)
class RootByCall(Net):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 3)


@hostile(KIND)
class RootByCallImpl(Net):
    def _call_impl(self, x: Tensor) -> Tensor:
        return super()._call_impl(x * 3)
