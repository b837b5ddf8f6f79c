"""Forwards that find out about a tensor by dispatching, matching, marking, or trying what may fail."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, conv, hostile, middle

KIND = "questions"


@middle(KIND)
def match_class(self: Any, x: Any) -> Any:
    match x:
        case Tensor():
            return x * 2
        case _:
            return x


@middle(KIND)
def match_shape(self: Any, x: Any) -> Any:
    match x.shape:
        case [_, 8, height, width] if height == width:
            return x * 2
        case _:
            return x


@middle(KIND)
def match_attributes(self: Any, x: Any) -> Any:
    match x:
        case Tensor(ndim=4, dtype=torch.float32):
            return x * 2
        case _:
            return x


@functools.singledispatch
def dispatched(x: Any) -> Any:
    return x


@dispatched.register
def _(x: Tensor) -> Any:
    return x * 2


@middle(KIND)
def singledispatch(self: Any, x: Any) -> Any:
    return dispatched(x)


@hostile(KIND)
class SingleDispatchMethod(Net):
    @functools.singledispatchmethod
    def between(self, x: Any) -> Any:
        return x

    @between.register
    def _(self, x: Tensor) -> Any:
        return x * 2


@middle(KIND, wanted="any")
def dispatched_by_class(self: Any, x: Any) -> Any:
    return {Tensor: lambda t: t * 2, list: lambda t: torch.cat(t)}[type(x)](x)


@middle(KIND)
def asserts_that_it_is_a_tensor(self: Any, x: Any) -> Any:
    assert isinstance(x, Tensor), type(x)
    assert type(x.shape[1]) is int
    return x * 2


@hostile(KIND, wanted="any")
class AsksInTheRoot(Net):
    """The question is about the model's own input."""

    def forward(self, x: Any) -> Any:
        return super().forward(x * 3 if type(x) is Tensor and not x.requires_grad and x.is_leaf else x)


@middle(KIND)
def marked_with_an_attribute(self: Any, x: Any) -> Any:
    y = x.mul(2)
    y.factor = 3.0
    return y * y.factor


@middle(KIND)
def marked_by_a_helper_and_asked(self: Any, x: Any) -> Any:
    y = x + 1
    y._is_shifted = True
    return y * 2 if getattr(y, "_is_shifted", False) else y


@middle(KIND, wanted="any")
def attributes_of_its_own(self: Any, x: Any) -> Any:
    return x * 2 if vars(x + 0) else x


BY_SIZE: Any = lambda: {"for_8": conv(8, 8), "factors": {"8": 2.0, "16": 3.0}}  # noqa: E731


@middle(KIND, layers=BY_SIZE)
def layer_by_the_text_of_a_size(self: Any, x: Any) -> Any:
    return getattr(self, f"for_{x.shape[-1]}", nn.Identity())(x) * self.factors[str(x.shape[1])]


@middle(KIND, layers=BY_SIZE)
def layer_by_the_size(self: Any, x: Any) -> Any:
    return {8: self.for_8, 16: self.c2}[x.shape[1]](x) * self.factors[str(x.shape[1])]


@middle(KIND, layers=lambda: {"depth": {1: conv(8, 8), 2: conv(8, 8)}, "g": conv(8, 8)})
def layer_that_is_no_child(self: Any, x: Any) -> Any:
    """Layers in a plain dict are no children: no state_dict and no copy of the model's parameters has them."""
    return self.g(x) + self.depth[1](x)


@middle(KIND)
def cached_by_sizes(self: Any, x: Any) -> Any:
    return x * _scale(x.shape[1], x.shape[2])


@functools.lru_cache(maxsize=4)
def _scale(channels: int, height: int) -> float:
    return 2.0 if isinstance(channels, int) and channels == height else 1.0


@middle(KIND)
def copied(self: Any, x: Any) -> Any:
    return copy.copy(x) * 2


@middle(KIND)
def identity_of_a_view(self: Any, x: Any) -> Any:
    y = x.view_as(x)
    return x * 2 if y is not x and y._base is not None else x


@middle(KIND)
def layer_given_in_place_and_identity(self: Any, x: Any) -> Any:
    y = F.relu(x, inplace=True)
    return x * 2 if y is x else x


# -- what fails is caught --------------------------------------------------------------------------------------------


@middle(KIND, wanted="said")
def try_a_number(self: Any, x: Any) -> Any:
    try:
        number = float(x.abs().mean())
    except Exception:
        number = 0.0
    return x * (1 + number)


@middle(KIND, wanted="said")
def try_a_decision(self: Any, x: Any) -> Any:
    try:
        return x * 2 if x.sum() > -1e9 else x
    except Exception:
        return x


@middle(KIND)
def try_a_decision_with_suppress(self: Any, x: Any) -> Any:
    with contextlib.suppress(Exception):
        if bool((x.detach() > -1e9).all()):
            return x * 2
    return x


@middle(KIND)
def try_an_assertion(self: Any, x: Any) -> Any:
    try:
        assert x.shape[1] == 8
        assert (x.isfinite()).all()
    except Exception:
        return x
    return x * 2


@middle(KIND)
def try_a_length(self: Any, x: Any) -> Any:
    try:
        samples = len(x)
    except Exception:
        return x * 3
    return x * (samples / x.shape[0] + 1)


@middle(KIND, wanted="any")
def try_to_iterate(self: Any, x: Any) -> Any:
    try:
        rows = list(x)
    except Exception:
        return x
    return torch.stack(rows) * 2


@middle(KIND, wanted="any")
def try_numpy(self: Any, x: Any) -> Any:
    try:
        size = x.detach().numpy().shape[1]
    except Exception:
        size = 0
    return x * (1 + size)


@middle(KIND)
def try_an_attribute(self: Any, x: Any) -> Any:
    try:
        return x * x.some_attribute_of_ours
    except AttributeError:
        return x * 2


@middle(KIND)
def try_a_wrong_call(self: Any, x: Any) -> Any:
    """The product fails for these shapes, and the fallback is the model."""
    try:
        return torch.matmul(x, torch.ones(3, 3))
    except RuntimeError:
        return x * 2


@middle(KIND)
def try_except_else_finally(self: Any, x: Any) -> Any:
    factor = 1
    try:
        found = x.data_ptr() == x.data_ptr() and bool(x.numel())
    except BaseException:
        found = False
    else:
        factor = 2
    finally:
        factor += 1
    return x * factor if found else x


@middle(KIND)
def try_a_hash(self: Any, x: Any) -> Any:
    try:
        seen = {x: 1}
    except TypeError:
        return x
    return x * (1 + seen[x])


@middle(KIND, wanted="any")
def try_a_deep_copy(self: Any, x: Any) -> Any:
    try:
        return copy.deepcopy(x.detach()) * 2
    except Exception:
        return x
