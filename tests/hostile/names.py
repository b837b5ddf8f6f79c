"""Modules, parameters, buffers, classes and arguments whose names are odd."""

from __future__ import annotations

from typing import Any

import torch
from nets import layers
from torch import Tensor, nn

from hostile.case import Net, add, conv, hostile, images, masked, sequences, with_layers

KIND = "names"


def _named(kind: type, name: str) -> Any:
    """A network one of whose layers, parameters or buffers has this name."""

    def build() -> nn.Module:
        net = Net(lambda self, x: getattr(self, name)(x) if kind is nn.Module else x * getattr(self, name))
        if kind is nn.Module:
            net.add_module(name, conv(8, 8))
        elif kind is nn.Parameter:
            net.register_parameter(name, nn.Parameter(torch.rand(8, 1, 1) + 0.5))
        else:
            net.register_buffer(name, torch.rand(8, 1, 1) + 0.5)
        return net

    return build


MODULES = {
    "keyword": "class", "keyword_lambda": "lambda", "constant": "None", "soft_keyword": "match", "single_quote": "it's",
    "double_quote": 'the "real" one', "both_quotes": """a'b"c""", "backslash": "a\\b", "newline": "a\nb",
    "unicode": "größe", "braces": "{x}%s", "call": "__import__('os')",
    "torch": "torch", "self": "self", "output": "output", "dunder": "__name__",
    "escape": "a\x1b[31mb",
}  # fmt: skip
MAY = ("backslash", "newline", "escape", "self")  # may be refused
TENSORS = {"keyword": "in", "double_quote": 'a"b'}
for _what, _name in MODULES.items():
    add(KIND, f"module_{_what}", _named(nn.Module, _name), images, wanted="any" if _what in MAY else "exact")
for _what, _name in TENSORS.items():
    add(KIND, f"parameter_{_what}", _named(nn.Parameter, _name), images)
    add(KIND, f"buffer_{_what}", _named(Tensor, _name), images)


def _walked(self: Any, x: Tensor) -> Tensor:
    for layer in self.h.values():
        x = layer(x)
    return x


def _clash() -> dict[str, Any]:
    """Dots and underscores: the names of nodes would be one and the same."""
    return dict(a=nn.Sequential(conv(8, 8)), a_0=conv(8, 8), a__0=conv(8, 8), relu=nn.Tanh(), add=conv(8, 8))


KEYS: Any = {
    "keys_of_a_dict": (lambda: dict(h=nn.ModuleDict({"class": conv(8, 8), "it's": nn.ReLU()})), _walked),
    "keys_of_parameters": (
        lambda: dict(h=nn.ParameterDict({"class": torch.rand(8, 1, 1), "a b": torch.rand(8, 1, 1)})),
        lambda self, x: x * self.h["class"] + self.h["a b"],
    ),
    "names_that_clash": (
        _clash, lambda self, x: self.add(torch.relu(self.a_0(self.a(x)) + self.relu(self.a__0(x))))
    ),
}  # fmt: skip
for _what, (_made, _used) in KEYS.items():
    with_layers(KIND, _made, {_what: _used})


def _class(name: str) -> Any:
    return lambda: type(name, (Net,), {})(lambda self, x: x * 2)


for _what, _name in {"quote": "It's", "keyword": "class", "newline": "a\nb"}.items():
    add(KIND, f"class_{_what}", _class(_name), images)


@hostile(KIND)
class ArgumentCalledAsABuiltin(Net):
    def forward(self, len: Tensor) -> Tensor:  # noqa: A002
        return super().forward(len / len.shape[0])


@hostile(KIND, wanted="any")
class ArgumentCalledTorch(Net):
    def forward(self, torch: Tensor) -> Tensor:
        return super().forward(torch.relu() - 0.5)


@hostile(KIND)
class ArgumentCalledAsAChild(Net):
    def forward(self, c1: Tensor, /) -> Tensor:
        return super().forward(c1 * 2)


@hostile(KIND, masked)
@layers(lambda: dict(a=nn.Linear(6, 16), b=nn.Linear(16, 12), f=nn.Linear(12, 4)))
def StarredArguments(self, *inputs: Tensor) -> Tensor:
    x, mask = inputs
    return self.f(self.b(self.a(x).relu() * mask[..., None]).relu().mean(1))


def _by_name(batch: int, seed: int) -> dict[str, Tensor]:
    x, mask = masked(batch, seed)
    return {"x": x, "mask": mask}


@hostile(KIND, _by_name)
class NamedArguments(StarredArguments):
    def forward(self, **inputs: Tensor) -> Tensor:
        return super().forward(inputs["x"], inputs.get("mask"))


@hostile(KIND, _by_name)
class NamedOnlyArguments(StarredArguments):
    def forward(self, *, mask: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, mask)


@hostile(KIND, sequences)
class DefaultThatIsATensor(StarredArguments):
    def forward(self, x: Tensor, mask: Tensor = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])) -> Tensor:  # noqa: B008
        return super().forward(x, mask)


@hostile(KIND)
class AttributeOfTheClass(Net):
    """A tensor on an instance hides one on its class."""

    anchors = torch.empty(0)

    def __init__(self) -> None:
        super().__init__()
        self.anchors = torch.rand(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.anchors
