"""Tiny networks of which hooks, forwards set on instances or overridden methods are a part."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HOOKED: dict[str, Callable[[], nn.Module]] = {}
SEEN: list[int] = []  # what a hook appends to by its global name
CALLS = 0  # what it counts there
SCALE = torch.tensor(3.0)


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1 = first or conv()
        self.c2, self.f = conv(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.c2(F.relu(self.c1(x)))).mean((2, 3)))


class Attentive(nn.Module):
    """Attention, or a recurrent layer, between the positions of a convolution's map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.f = conv(), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        many = (x,) * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1)
        return self.f(self.inner(*many)[0].mean(1))


def conv(before: int = 3, after: int = 8, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    torch.manual_seed(before)
    return kind(before, after, 3, padding=1)


def images(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def with_hook(hook: Callable[..., Any], **options: Any) -> nn.Module:
    """A network with a forward hook on its first layer."""
    net = Net()
    net.c1.register_forward_hook(hook, **options)
    return net


def hooked(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Enter a builder of a network into the table."""
    HOOKED[build.__name__] = build
    return build


# -- hooks -------------------------------------------------------------------------------------------------------------


def _in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.mul_(2).add_(1)


def _by_globals(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    SEEN.append(1)
    return output * SCALE


def _that_may_return(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return output.clamp(max=0.1) if output.max() > 1e3 else None


def _by_a_tensor() -> nn.Module:
    scale = torch.rand(8, 1, 1)
    return with_hook(lambda module, inputs, output: output * scale)


HOOKED |= {
    "hook_on_a_layer": lambda: with_hook(lambda module, inputs, output: output * 2 + 1),
    "hook_with_kwargs_always_called": lambda: with_hook(
        lambda module, args, kwargs, output: output - 1, with_kwargs=True, always_call=True
    ),
    "hook_in_place": lambda: with_hook(_in_place),
    "hook_by_a_tensor": _by_a_tensor,
    "hook_by_globals": lambda: with_hook(_by_globals),
    "hook_that_may_return": lambda: with_hook(_that_may_return),
}


@hooked
def hook_by_a_module_of_the_model() -> nn.Module:
    net = Net()
    net.scale = nn.Linear(8, 1, bias=False)
    net.c1.register_forward_hook(lambda module, inputs, output: output * net.scale.weight.mean())
    return net


@hooked
def hook_by_what_another_noted() -> nn.Module:
    net, noted = Net(), {}
    net.c1.register_forward_hook(lambda module, inputs, output: noted.update(x=output))
    net.f.register_forward_pre_hook(lambda module, inputs: inputs[0] + noted["x"].mean())
    return net


@hooked
def hook_of_an_object() -> nn.Module:
    class Doubling:
        def __init__(self) -> None:
            self.calls: list[int] = []

        def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.calls.append(1)
            return output * 2

        def method(self, module: nn.Module, inputs: Any) -> Any:
            return (inputs[0] + 1,)

    net, doubling = with_hook(Doubling()), Doubling()
    net.c2.register_forward_pre_hook(doubling.method)
    net.f.register_forward_hook(functools.partial(lambda k, module, inputs, output: output * k, 3))
    return net


@hooked
def hook_on_an_lstm() -> nn.Module:
    net = Attentive(nn.LSTM(8, 8, batch_first=True))
    net.inner.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    return net


@hooked
def hook_on_attention() -> nn.Module:
    net = Attentive(nn.MultiheadAttention(8, 2, batch_first=True))
    net.inner.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    net.inner.out_proj.register_forward_hook(lambda module, inputs, output: output * 9)  # which torch never calls
    return net


@hooked
def hooks_in_and_on_a_container() -> nn.Module:
    net = Net(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()))
    net.c1.register_forward_hook(lambda module, inputs, output: output * 2)
    net.c1[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    net.c1[1].register_forward_hook(lambda module, inputs, output: output * 3)
    return net


@hooked
def hook_on_a_layer_called_twice() -> nn.Module:
    twice = conv(8, 8)
    twice.register_forward_hook(lambda module, inputs, output: output * 2)
    return Net(nn.Sequential(conv(), twice, twice))


@hooked
def hooks_at_the_root() -> nn.Module:
    net = Net()
    net.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.5) / 0.2,))
    net.register_forward_hook(lambda module, inputs, output: output.softmax(-1))
    return net


@hooked
def pre_hook_with_kwargs() -> nn.Module:
    net = Net()
    net.c2.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    return net


@hooked
def pre_hook_that_computes_a_weight() -> nn.Module:
    net = Net()
    net.c1.weight_orig = net.c1._parameters.pop("weight")

    def hook(module: nn.Module, inputs: Any) -> None:
        module.weight = module.weight_orig * 2

    net.c1.register_forward_pre_hook(hook)
    return net


@hooked
def weight_that_a_pre_hook_left() -> nn.Module:
    net = pre_hook_that_computes_a_weight()
    net(images(2))
    return net


# -- forwards set on instances -----------------------------------------------------------------------------------------


def _replaced(make: Callable[..., Any], name: str = "c1", attribute: str = "forward", first: Any = None) -> nn.Module:
    """A network of which one method of one layer is what ``make`` makes of the layer and that method."""
    net = Net(first() if first else None)
    layer = net.get_submodule(name)
    setattr(layer, attribute, make(layer, getattr(layer, attribute)))
    return net


def _doubled(self: nn.Conv2d, factor: int, x: Tensor) -> Tensor:
    return self._conv_forward(x, self.weight, self.bias) * factor


def _normed() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(8))


def _by_a_global_one(layer: nn.Module, old: Any) -> Any:
    global OLD_FORWARD
    OLD_FORWARD = old
    return lambda x: OLD_FORWARD(x) * 2


@hooked
def forward_on_attention() -> nn.Module:
    net = Attentive(nn.MultiheadAttention(8, 2, batch_first=True))
    old = net.inner.forward
    net.inner.forward = lambda *args, **kwargs: (old(*args, **kwargs)[0] * 2, None)
    return net


HOOKED |= {
    "forward_closing_over_the_old_one": lambda: _replaced(lambda layer, old: lambda x: old(x) * 2),
    "forward_by_a_global_one": lambda: _replaced(_by_a_global_one),
    "forward_as_a_method": lambda: _replaced(lambda c, old: types.MethodType(lambda self, x: _doubled(self, 2, x), c)),
    "forward_as_a_partial": lambda: _replaced(lambda layer, old: functools.partial(_doubled, layer, 3)),
    "forward_of_the_root": lambda: _replaced(lambda layer, old: lambda x: old(x * 3), ""),
    "forward_on_batchnorm": lambda: _replaced(lambda layer, old: lambda x: old(x) * 2, "c1.1", first=_normed),
    "another_method_set_on_a_layer": lambda: _replaced(
        lambda layer, old: lambda x, weight, bias: old(x, weight * 2, bias), attribute="_conv_forward"
    ),
}


# -- classes that compute something else -------------------------------------------------------------------------------


class DoubleWeight(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class DoubleCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class DoubleAttribute(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.uniform_(self._parameters["bias"])  # torch filled the doubled one: this holds what was in memory

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "bias" and not torch.is_grad_enabled() else found


class PropertyWeight(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("base", self._parameters.pop("weight"))
        self.__class__ = type("Computed", (PropertyWeight,), {"weight": property(lambda self: self.base * 2)})


class CalledNet(Net):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 2) + 1


for _kind in (DoubleWeight, DoubleCall, DoubleAttribute, PropertyWeight):
    HOOKED[_kind.__name__] = functools.partial(lambda kind: Net(conv(kind=kind)), _kind)
HOOKED[CalledNet.__name__] = CalledNet


# -- hooks that look on ------------------------------------------------------------------------------------------------


def watched() -> tuple[nn.Module, list[Any]]:
    """A network with hooks that only look on, some in ways that cannot be traced, and what they have seen."""
    net, seen = Net(), []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(float(output.mean()))
        module.last = output

    net.c1.register_forward_hook(look)
    net.c2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().numpy()))
    net.f.register_forward_hook(lambda module, inputs, output: output)
    net.register_forward_hook(lambda module, inputs, output: seen.append(int(output.argmax())))
    return net, seen
