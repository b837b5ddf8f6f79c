"""Hooks that change values, forwards that are set on an instance, and subclasses that compute in other places."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Deep, Net, Steps, changed, conv, hostile, masked

KIND = "hooks"


def _normalised(module: Any, args: Any) -> Any:
    return ((args[0] - 0.5) / 0.2,)


def _doubled(module: Any, args: Any, out: Tensor) -> Tensor:
    return out * 2 + 1


def _in_place(module: Any, args: Any, out: Tensor) -> None:
    out.mul_(2).add_(1)


def _input_in_place(module: Any, args: Any) -> None:
    args[0].mul_(3)


def _by_weight(module: Any, args: Any, out: Tensor) -> Tensor:
    return out * module.weight.mean()


def _with_keywords(module: Any, args: Any, kwargs: Any) -> Any:
    return tuple(arg * 3 for arg in args), {name: value * 3 for name, value in kwargs.items()}


def _out_with_keywords(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    return out * (2 + len(args))


def _twice(net: Deep) -> None:
    net.c1.register_forward_hook(lambda module, args, out: out + 1)
    net.c1.register_forward_hook(lambda module, args, out: out * 2)


def _prepended(net: Deep) -> None:
    net.c1.register_forward_hook(lambda module, args, out: out + 1)
    net.c1.register_forward_hook(lambda module, args, out: out * 2, prepend=True)


def _removed(net: Deep) -> None:
    net.c1.register_forward_hook(_doubled).remove()


def _observer(net: Deep) -> None:
    net.block.register_forward_hook(lambda module, args, out: None)
    net.c1.register_forward_pre_hook(lambda module, args: None)


def _of_gradients(net: Deep) -> None:
    net.c2.register_full_backward_hook(lambda module, given, taken: None)
    net.f.weight.register_hook(lambda grad: grad * 2)
    net.register_state_dict_post_hook(lambda module, state, prefix, meta: None)


HOOKS: dict[str, Callable[[Deep], Any]] = {
    "on_a_layer": lambda net: net.c1.register_forward_hook(_doubled),
    "on_the_root": lambda net: net.register_forward_hook(_doubled),
    "on_a_container": lambda net: net.block.register_forward_hook(_doubled),
    "on_an_activation": lambda net: net.act.register_forward_hook(_doubled),
    "on_a_norm": lambda net: net.bn.register_forward_hook(_doubled),
    "on_every_layer": lambda net: [layer.register_forward_hook(_doubled) for layer in (net.c1, net.c2, net.f)],
    "in_place": lambda net: net.c1.register_forward_hook(_in_place),
    "in_place_before": lambda net: net.act.register_forward_pre_hook(_input_in_place),
    "by_the_weight": lambda net: net.c2.register_forward_hook(_by_weight),
    "twice": _twice,
    "removed": _removed,
    "that_observes": _observer,
    "of_gradients": _of_gradients,
    "with_keywords": lambda net: net.c2.register_forward_hook(_out_with_keywords, with_kwargs=True),
    "before_the_root": lambda net: net.register_forward_pre_hook(_normalised),
    "before_a_layer": lambda net: net.c2.register_forward_pre_hook(_normalised),
    "before_a_layer_with_keywords": lambda net: net.c2.register_forward_pre_hook(_with_keywords, with_kwargs=True),
    "before_a_layer_a_bare_value": lambda net: net.c2.register_forward_pre_hook(lambda module, args: args[0] * 2),
    "a_method_of_the_model": lambda net: net.c1.register_forward_hook(types.MethodType(lambda n, m, a, o: o * 2, net)),
    "a_partial": lambda net: net.c1.register_forward_hook(functools.partial(lambda k, m, a, o: o * k, 3)),
}
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
        given = super().forward(x)
        return given + self.features["block"].mean((1, 2, 3))[:, None]


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
class HookOnASharedLayer(Net):
    """One layer at two places, with one hook."""

    def __init__(self) -> None:
        super().__init__(g=conv(8, 8))
        self.again = self.g
        self.g.register_forward_hook(_doubled)

    def between(self, x: Tensor) -> Tensor:
        return self.again(self.g(x).relu())


@hostile(KIND, masked)
def hook_that_changes_a_mask() -> nn.Module:
    net = Steps(lambda _, h, mask: h * mask[..., None])
    net.register_forward_pre_hook(lambda module, args: (args[0], 1 - args[1]))
    return net


# -- forwards set on an instance -------------------------------------------------------------------------------------


def _closure(name: str) -> Callable[[Deep], None]:
    def change(net: Deep) -> None:
        layer = net.get_submodule(name)
        old = layer.forward
        layer.forward = lambda x: old(x) * 2  # type: ignore[method-assign]

    return change


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


def _decorated(net: Deep) -> None:
    old = net.c1.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return old(*args, **kwargs).abs()

    _set(net.c1, forward)


FORWARDS: dict[str, Callable[[Deep], Any]] = {
    "method_on_the_root": lambda net: _set(net, types.MethodType(_scaled, net)),
    "method_on_a_layer": lambda net: _set(net.c1, types.MethodType(_scaled, net.c1)),
    "method_on_a_container": lambda net: _set(net.block, types.MethodType(_scaled, net.block)),
    "partial_on_the_root": lambda net: _set(net, functools.partial(_scaled, net, scale=3.0)),
    "partial_on_a_layer": lambda net: _set(net.c2, functools.partial(_scaled, net.c2, scale=3.0)),
    "closure_on_the_root": _closure(""),
    "closure_on_a_layer": _closure("c1"),
    "closure_on_a_container": _closure("block"),
    "closure_over_the_model": lambda net: _set(
        net.c2, lambda x: F.conv2d(x, net.c2.weight, net.c2.bias, padding=1) * 2
    ),
    "decorated": _decorated,
    "object": lambda net: _set(net.c1, Caller(net.c1)),
    "of_another_layer": lambda net: _set(net.act, nn.Tanh().forward),
    "of_a_layer_of_the_model": lambda net: _set(net.act, nn.Sequential(conv(8, 8)).forward),
    "without_gradients": lambda net: _set(net.c1, torch.no_grad()(net.c1.forward)),
    "call_on_an_instance": lambda net: setattr(net.c1, "__call__", lambda x: x * 0),
    "conv_forward_on_an_instance": lambda net: setattr(
        net.c1, "_conv_forward", lambda x, w, b: F.conv2d(x, w * 2, b, padding=1)
    ),
}
changed(KIND, {f"forward_{name}": change for name, change in FORWARDS.items()})
