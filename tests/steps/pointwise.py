"""Element-wise steps: every spelling of every operation, from the names that the rules list."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from torchvision.ops.stochastic_depth import stochastic_depth

from fxprune.rules import pointwise as rules
from fxprune.rules.table import RULES
from steps.kind import exactly, kind

add = partial(kind, "pointwise")


def _inside(x: Tensor) -> Tensor:
    """Numbers between 0 and 1, of which all functions are defined."""
    return x.sigmoid()


def _beyond(x: Tensor) -> Tensor:
    """Numbers above 1."""
    return _inside(x) + 1


def _truth(x: Tensor) -> Tensor:
    return x > 0


def _ones(x: Tensor) -> Tensor:
    """Probabilities that leave nothing to chance."""
    return (x > 0).to(x)


def _names(text: str) -> list[str]:
    return text.split()


_FROM: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(
    _names(
        "asin acos atanh log log2 log10 log1p sqrt rsqrt logit pow float_power xlogy reciprocal fmod remainder rsub "
        "div true_divide floor_divide divide addcdiv mod ipow itruediv ifloordiv imod truediv floordiv arcsin arccos "
        "arctanh erfinv lgamma digamma polar"
    ),
    _inside,
)
_FROM |= {"acosh": _beyond, "arccosh": _beyond, "poisson": _beyond, "float_power": lambda x: _inside(x).double()}
_FROM["byte"] = lambda x: 200 * _inside(x)
_FROM |= dict.fromkeys(
    _names("bitwise_and bitwise_or bitwise_xor bitwise_not and_ or_ xor inv invert iand ior ixor"), _truth
)
_TWO = set(
    _names(
        "add sub mul div true_divide floor_divide remainder fmod pow float_power maximum minimum fmax fmin atan2 hypot "
        "copysign logaddexp rsub subtract multiply divide xlogy heaviside eq ne gt ge lt le greater greater_equal less "
        "less_equal not_equal isclose logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor copy "
        "type_as polar complex logaddexp2 ldexp arctan2 truediv floordiv mod iadd isub imul itruediv ifloordiv imod "
        "ipow and_ or_ xor iand ior ixor"
    )
)
_THREE = {"lerp", "addcmul", "addcdiv"}
_FLAT = {"floor_divide", "floordiv", "ifloordiv", "heaviside"}  # torch has no gradient of these
_FLAT_IN_PLACE = {"asinh", "acosh", "atanh", "arcsinh", "arccosh", "arctanh"}
_MORE: dict[str, tuple[Any, ...]] = {
    "clamp": (-0.5, 0.5), "clip": (-0.5, 0.5), "clamp_min": (0.1,), "clamp_max": (0.1,), "threshold": (0.1, 0.2),
    "normal": (0.5,), "fill": (0.5,), "to": (torch.float32,), "type": (torch.float32,),
}  # fmt: skip
_DROPS = {"dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"}
_AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda x: x.ceil(), "polar": torch.angle, "complex": torch.abs,
} | dict.fromkeys(_names("randn_like normal poisson uniform exponential"), torch.isfinite)  # fmt: skip
_ALONE = {"where", "masked_fill", "bernoulli", "cuda", *_DROPS}


def _run(call: Callable[..., Tensor], name: str, *, changes: bool) -> Callable[..., Tensor]:
    """What a spelling makes of one, two or three images: prepared, called, and a tensor of the images' dtype again."""
    domain, after, more = _FROM.get(name, _itself), _AFTER.get(name, _itself), _MORE.get(name, ())
    flat = name in _FLAT or (changes and name in _FLAT_IN_PLACE)

    def bare(_: Any, *images: Tensor) -> Tensor:
        first, *others = (domain(image.detach() if flat else image) for image in images)
        return after(call(first.clone() if changes else first, *others, *more))

    samples = [torch.ones(1, 1, 1, 1, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    if all(bare(None, *[sample] * _inputs(name)).dtype == sample.dtype for sample in samples):
        return bare
    return lambda _, x, *others: bare(_, x, *others).to(x)


def _itself(x: Tensor) -> Tensor:
    return x


def _inputs(name: str) -> int:
    return 2 if name in _TWO else 3 if name in _THREE else 1


def _dropped(call: Callable[..., Tensor], x: Tensor, *, flat: bool) -> Tensor:
    """What a dropout gives in eval mode."""
    return call(x.flatten(2), 0.5, False).view_as(x) if flat else call(x, 0.5, False)


def _add(title: str, name: str, call: Callable[..., Tensor], *, changes: bool = False) -> None:
    add(title, _run(call, name, changes=changes), inputs=_inputs(name))


def _spellings(name: str) -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """The functions and methods of a name that have rules, and whether they change their first argument."""
    found: dict[str, tuple[Callable[..., Tensor], bool]] = {}
    for own in (name, f"{name}_"):
        if own in RULES and hasattr(Tensor, own):
            found[own] = partial(exactly, own), own.endswith("_")
        for home, where in ((torch, "torch"), (F, "F")):
            function = getattr(home, own, None)
            if function in RULES and function not in [getattr(call, "args", (call,))[0] for call, _ in found.values()]:
                found[f"{where}.{own}"] = partial(exactly, function), own.endswith("_")
    return found


for _name in dict.fromkeys(name.rstrip("_") for name in rules._ARITHMETIC + rules._FUNCTIONS):
    for _title, (_call, _changes) in _spellings(_name).items():
        if _name not in _ALONE:
            _add(_title, _name, _call, changes=_changes)
        elif _name in _DROPS:
            _drop = partial(_dropped, _call, flat=_name.endswith("1d"))
            add(_title, _run(_drop, _name, changes=_changes))
        elif _name == "bernoulli":
            add(
                _title,
                _run(
                    lambda x, f=_call, certain=_changes: f(x, 1.0) if certain else f(_ones(x)), _name, changes=_changes
                ),
            )
        elif _name == "masked_fill":
            add(_title, lambda _, x, y, f=_call: f(x.clone(), y > 0, 0.5), inputs=2)
add("torch.imag", lambda _, x, y: torch.imag(torch.complex(x, y)) + torch.real(torch.complex(y, x).conj()), inputs=2)
for _name in rules._SPECIAL:
    _add(f"torch.special.{_name}", _name if _name == "erfinv" else "sqrt", getattr(torch.special, _name))
add("torch.dropout by names", lambda _, x: torch.dropout(input=x, p=0.5, train=False))
for _title, _call in _spellings("where").items():
    if _title.startswith("torch"):
        add(_title, lambda _, x, y, z, f=_call[0]: f(x > 0, y, z), inputs=3)
    else:
        add(_title, lambda _, x, y, z, f=_call[0]: f(x, y > 0, z), inputs=3)

for _name in rules._OPERATORS:
    _add(
        f"operator.{_name}",
        _name,
        partial(exactly, getattr(operator, _name)),
        changes=_name.startswith("i") and _name not in ("inv", "invert"),
    )
for _name in ("add", "sub", "mul", "truediv"):
    _add(f"__{_name}__", _name, partial(exactly, f"__{_name}__"))
    _add(f"__r{_name}__", _name, partial(exactly, f"__r{_name}__"))

for _class in (*rules._MODULES, StochasticDepth):
    _args: tuple[Any, ...] = {nn.Threshold: (0.1, 0.2), StochasticDepth: (0.5, "row")}.get(_class, ())
    if _class is nn.Dropout1d:
        add("nn.Dropout1d", lambda layer, x: layer(x.flatten(2)).view_as(x), lambda i, o: nn.Dropout1d())
    else:
        add(f"nn.{_class.__name__}", lambda layer, x: layer(x), lambda i, o, c=_class, a=_args: c(*a))
add("stochastic_depth", lambda _, x: exactly(stochastic_depth, x, 0.5, "row", False))
add("nn.PReLU", lambda layer, x: layer(x), lambda i, o: nn.PReLU(i))
for _title, _call in (("F.prelu", F.prelu), ("torch.prelu", torch.prelu), ("prelu", partial(exactly, "prelu"))):
    add(_title, lambda own, x, f=_call: f(x, own.weight), lambda i, o: nn.PReLU(i))
add(
    "nn.GLU",
    lambda layer, x: layer(x),
    lambda i, o: nn.GLU(1),
    width=lambda i, o: i // 2,
    needs=lambda i: i % 2 == 0 and i > 2,
    alike=False,
)
add("F.glu", lambda _, x: F.glu(x, 1), width=lambda i, o: i // 2, needs=lambda i: i % 2 == 0 and i > 2, alike=False)
