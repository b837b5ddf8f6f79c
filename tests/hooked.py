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


def conv(before: int = 3, after: int = 8, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    torch.manual_seed(before)
    return kind(before, after, 3, padding=1)


def images(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def hooked(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Enter a builder of a network into the table."""
    HOOKED[build.__name__] = build
    return build


def with_hook(hook: Callable[..., Any], **options: Any) -> nn.Module:
    """A network with a forward hook on its first layer."""
    net = Net()
    net.c1.register_forward_hook(hook, **options)
    return net


# -- hooks -------------------------------------------------------------------------------------------------------------


@hooked
def hook_on_a_layer() -> nn.Module:
    return with_hook(lambda module, inputs, output: output * 2 + 1)


@hooked
def hook_with_kwargs_always_called() -> nn.Module:
    return with_hook(lambda module, args, kwargs, output: output - 1, with_kwargs=True, always_call=True)


@hooked
def hook_in_place() -> nn.Module:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.mul_(2).add_(1)

    return with_hook(hook)


@hooked
def hook_by_a_module_of_the_model() -> nn.Module:
    net = Net()
    net.scale = nn.Linear(8, 1, bias=False)
    net.c1.register_forward_hook(lambda module, inputs, output: output * net.scale.weight.mean())
    return net


@hooked
def hook_by_a_tensor() -> nn.Module:
    scale = torch.rand(8, 1, 1)
    return with_hook(lambda module, inputs, output: output * scale)


@hooked
def hook_by_globals() -> nn.Module:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        SEEN.append(1)
        return output * SCALE

    return with_hook(hook)


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
def hook_that_may_return() -> nn.Module:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output.clamp(max=0.1) if output.max() > 1e3 else None

    return with_hook(hook)


@hooked
def hook_on_batchnorm() -> nn.Module:
    net = Net(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    net.c1[1].register_forward_hook(lambda module, inputs, output: output * 2)
    return net


@hooked
def hook_on_an_lstm() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.lstm, self.f = conv(), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0][:, -1])

    net = Recurrent()
    net.lstm.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    return net


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.attend, self.f = conv(), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.f(self.attend(x, x, x)[0].mean(1))


@hooked
def hook_on_attention() -> nn.Module:
    net = Attentive()
    net.attend.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    net.attend.out_proj.register_forward_hook(lambda module, inputs, output: output * 9)  # which torch never calls
    return net


@hooked
def hooks_in_and_on_a_container() -> nn.Module:
    net = Net(nn.Sequential(conv(), nn.ReLU()))
    net.c1.register_forward_hook(lambda module, inputs, output: output * 2)
    net.c1[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return net


@hooked
def hook_on_a_layer_called_twice() -> nn.Module:
    twice = conv(8, 8)
    twice.register_forward_hook(lambda module, inputs, output: output * 2)
    return Net(nn.Sequential(conv(), twice, twice))


@hooked
def pre_hook_at_the_root() -> nn.Module:
    net = Net()
    net.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.5) / 0.2,))
    return net


@hooked
def pre_hook_with_kwargs() -> nn.Module:
    net = Net()
    net.c2.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    return net


@hooked
def hook_at_the_root() -> nn.Module:
    net = Net()
    net.register_forward_hook(lambda module, inputs, output: output.softmax(-1))
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


@hooked
def forward_closing_over_the_old_one() -> nn.Module:
    net = Net()
    old = net.c1.forward
    net.c1.forward = lambda x: old(x) * 2
    return net


@hooked
def forward_by_a_global_one() -> nn.Module:
    global OLD_FORWARD
    net = Net()
    OLD_FORWARD = net.c1.forward
    net.c1.forward = lambda x: OLD_FORWARD(x) * 2
    return net


def doubled(self: nn.Conv2d, factor: int, x: Tensor) -> Tensor:
    return self._conv_forward(x, self.weight, self.bias) * factor


@hooked
def forward_as_a_method() -> nn.Module:
    net = Net()
    net.c1.forward = types.MethodType(lambda self, x: doubled(self, 2, x), net.c1)
    return net


@hooked
def forward_as_a_partial() -> nn.Module:
    net = Net()
    net.c1.forward = functools.partial(doubled, net.c1, 3)
    return net


@hooked
def forward_of_the_root() -> nn.Module:
    net = Net()
    old = net.forward
    net.forward = lambda x: old(x * 3)
    return net


@hooked
def forward_on_batchnorm() -> nn.Module:
    net = Net(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    old = net.c1[1].forward
    net.c1[1].forward = lambda x: old(x) * 2
    return net


@hooked
def forward_on_attention() -> nn.Module:
    net = Attentive()
    old = net.attend.forward
    net.attend.forward = lambda *args, **kwargs: (old(*args, **kwargs)[0] * 2, None)
    return net


@hooked
def another_method_set_on_a_layer() -> nn.Module:
    net = Net()
    old = net.c1._conv_forward
    net.c1._conv_forward = lambda x, weight, bias: old(x, weight * 2, bias)
    return net


# -- classes that compute something else -------------------------------------------------------------------------------


class DoubleWeight(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class DoubleCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class WeightReadTwice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.weight.flip(2), padding=1)


class DoubleAttribute(nn.Conv2d):
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


for _kind in (DoubleWeight, DoubleCall, WeightReadTwice, DoubleAttribute, PropertyWeight):
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
