"""Forwards that ask what a tensor is, has, or who runs them, or try what fails: the answers are those of eager mode."""

from __future__ import annotations

import collections.abc
import copy
import functools
import math
import numbers
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, conv, hostile, masked, middle, middles, with_layers

KIND = "questions"


@runtime_checkable
class Shaped(Protocol):
    shape: Any

    def size(self) -> Any: ...


@runtime_checkable
class Estimator(Protocol):
    def fit(self, x: Any) -> Any: ...


ABSTRACT = (collections.abc.Iterable, collections.abc.Sized, collections.abc.Hashable, typing.SupportsFloat)
FOREIGN = (
    nn.Module, nn.Parameter, nn.Buffer, torch.cuda.FloatTensor, dict, collections.abc.Mapping, tuple, list,
    numbers.Number, collections.abc.Sequence, collections.abc.Iterator, int, float, str, np.ndarray,
)  # fmt: skip

OF_TYPES: dict[str, Callable[[Any], Any]] = {
    "isinstance_of_abstract_types": lambda x: all(isinstance(x, kind) for kind in ABSTRACT),
    "isinstance_of_foreign_types": lambda x: any(isinstance(x, kind) for kind in FOREIGN),
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance_of_a_union": lambda x: isinstance(x, Tensor | list),
    "isinstance_float_tensor": lambda x: isinstance(x, torch.FloatTensor),
    "isinstance_proxy": lambda x: isinstance(x, torch.fx.Proxy),
    "isinstance_protocol": lambda x: isinstance(x, Shaped),
    "isinstance_another_protocol": lambda x: isinstance(x, Estimator),
    "is_tensor": torch.is_tensor,
    "type_is": lambda x: type(x) is Tensor,
    "type_name": lambda x: type(x).__name__ == "Tensor",
    "type_representation": lambda x: "Proxy" in repr(type(x)),
    "class_is": lambda x: x.__class__ is Tensor,
    "issubclass": lambda x: issubclass(type(x), Tensor),
    "dispatch_table": lambda x: {Tensor: True}.get(type(x), False),
    "callable": callable,
    "has_an_unknown_attribute": lambda x: hasattr(x, "some_attribute_of_ours"),
    "getattr_default": lambda x: getattr(x, "scale", None) is not None,
    "dir": lambda x: "node" in dir(x),
    "torch_function_attribute": lambda x: type(x).__torch_function__ == Tensor.__torch_function__,
}

OF_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "is_of_another_kind": lambda x: any(
        (x.is_cuda, x.is_meta, x.is_sparse, x.is_quantized, x.is_nested, x.is_complex())
    ),
    "memory": lambda x: x.is_contiguous() and x.data_ptr() == x.detach().data_ptr() and x[:, :4]._base is not None,
    "sizes_as_numbers": lambda x: divmod(x.shape[1], 3) == (2, 2) and x.shape[1] in range(4, 9) and not x.shape[1] & 7,
    "device_isinstance": lambda x: isinstance(x.device, torch.device),
    "shape_equals": lambda x: x.shape[1:] == (8, 8, 8),
    "size_isinstance_int": lambda x: isinstance(x.shape[1], int),
    "size_isinstance_symbol": lambda x: isinstance(x.shape[0], torch.SymInt),
    "size_in_a_text": lambda x: f"{x.shape[1]}" == "8" and "%d" % x.shape[2] == "8",  # noqa: UP031
    "size_in_mathematics": lambda x: math.isqrt(x.shape[1]) == 2 and math.prod(x.shape[1:]) == 512,
    "identity_after_in_place": lambda x: x.relu_() is x,
    "identity_after_contiguous": lambda x: x.contiguous() is x,
    "representation": lambda x: repr(x).startswith("tensor("),
}

OF_THE_RUN: dict[str, Callable[[Any], Any]] = {
    "is_tracing": lambda x: torch.jit.is_tracing(),
    "is_fx_tracing": lambda x: torch.fx._symbolic_trace.is_fx_tracing(),
    "is_compiling": lambda x: torch.compiler.is_compiling(),
}
OF_GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "grad_fn_is_none": lambda x: x.grad_fn is None,
    "is_grad_enabled": lambda x: torch.is_grad_enabled(),
}


def _doubled_where(question: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: x * 2 if question(x) else x


MAY = (
    "isinstance_float_tensor", "type_representation", "dir", "torch_function_attribute", "identity_after_contiguous",
    "representation", "type_is", "type_name", "class_is", "dispatch_table", "memory", "isinstance_proxy",
    "identity_after_in_place",
)  # fmt: skip
for questions in (OF_TYPES, OF_ATTRIBUTES, OF_THE_RUN):
    middles(KIND, {name: _doubled_where(question) for name, question in questions.items()}, MAY)
middles(KIND, {name: _doubled_where(question) for name, question in OF_GRADIENTS.items()}, wanted="any")

OF_MASKS: dict[str, Callable[[Any], Any]] = {
    "mask_isinstance": lambda mask: isinstance(mask, Tensor),
    "mask_is_not_none": lambda mask: mask is not None,
    "mask_has_a_dtype": lambda mask: hasattr(mask, "dtype") and mask.dtype.is_floating_point,
}


def _masked_where(question: Callable[[Any], Any]) -> Any:
    return Steps(lambda _, h, mask: h * mask[..., None] if question(mask) else h)


for _name, _question in OF_MASKS.items():
    add(KIND, _name, partial(_masked_where, _question), masked)
add(KIND, "mask_of_which_any_counts", partial(_masked_where, lambda mask: mask[0, 0] > 0), masked, wanted="said")


# -- dispatching, matching, marking ------------------------------------------------------------------------------------


@functools.singledispatch
def dispatched(x: Any) -> Any:
    return x


@dispatched.register
def _(x: Tensor) -> Any:
    return x * 2


@middle(KIND)
def matched(self: Any, x: Any) -> Any:
    match x:
        case Tensor(ndim=4, dtype=torch.float32):
            x = x * 2
    match x.shape:
        case [_, 8, height, width] if height == width:
            return dispatched(x)
        case _:
            return x


@hostile(KIND)
class SingleDispatchMethod(Net):
    @functools.singledispatchmethod
    def between(self, x: Any) -> Any:
        return x

    @between.register
    def _(self, x: Tensor) -> Any:
        return x * 2


@hostile(KIND, wanted="any")
class AsksInTheRoot(Net):
    """The question is about the model's own input."""

    def forward(self, x: Any) -> Any:
        return super().forward(x * 3 if type(x) is Tensor and not x.requires_grad and x.is_leaf else x)


@middle(KIND)
def marked_by_a_helper_and_asked(self: Any, x: Any) -> Any:
    y = x + 1
    y._is_shifted, y.factor = True, 3.0
    return y * y.factor if getattr(y, "_is_shifted", False) else y


BY_SIZE: Any = {
    "layer_by_the_text_of_a_size": lambda self, x: (
        getattr(self, f"for_{x.shape[-1]}", nn.Identity())(x) * self.factors[str(x.shape[1])]
    ),
    "layer_that_is_no_child": lambda self, x: self.for_8(x) + self.depth[1](x),
}
OF_SIZES = partial(
    with_layers, KIND, lambda: dict(for_8=conv(8, 8), factors={"8": 2.0, "16": 3.0}, depth={1: conv(8, 8)})
)
OF_SIZES(BY_SIZE)
OF_SIZES({"layer_by_the_size": lambda self, x: {8: self.for_8, 16: self.c2}[x.shape[1]](x)}, wanted="any")


@functools.lru_cache(maxsize=4)
def _scale(channels: int, height: int) -> float:
    return 2.0 if isinstance(channels, int) and channels == height else 1.0


def _same_after(function: Callable[[Any], Any], x: Any) -> Any:
    y = function(x)
    return x * 2 if y is x else x


OF_IDENTITY: dict[str, Callable[[Any], Any]] = {
    "cached_by_sizes": lambda x: x * _scale(x.shape[1], x.shape[2]),
    "copied": lambda x: copy.copy(x) * 2,
    "identity_of_a_view": partial(_same_after, lambda x: x.view_as(x)),
    "layer_given_in_place_and_identity": partial(_same_after, lambda x: F.relu(x, inplace=True)),
}
middles(KIND, OF_IDENTITY, ["cached_by_sizes", "layer_given_in_place_and_identity"])
middles(KIND, {"attributes_of_its_own": lambda x: x * 2 if vars(x + 0) else x}, wanted="any")


# -- what fails is caught ----------------------------------------------------------------------------------------------


def _tried(attempt: Callable[[Any], Any], otherwise: Callable[[Any], Any], x: Any) -> Any:
    try:
        return attempt(x)
    except Exception:
        return otherwise(x)


def _asserted(x: Any) -> Any:
    assert x.shape[1] == 8
    assert x.isfinite().all()
    return x * 2


TRIED: dict[str, tuple[Any, ...]] = {  # an attempt, and what is done if it fails, by which errors, in eager mode
    "number": (lambda x: x * (1 + float(x.abs().mean())), lambda x: x, "said"),
    "decision": (lambda x: x * 2 if x.sum() > -1e9 else x, lambda x: x, "said"),
    "an_assertion": (_asserted, lambda x: x, "exact"),
    "a_length": (lambda x: x * (len(x) / x.shape[0] + 1), lambda x: x * 3, "exact"),
    "to_iterate": (lambda x: torch.stack(list(x)) * 2, lambda x: x, "any"),
    "numpy": (lambda x: x * (1 + x.detach().numpy().shape[1]), lambda x: x, "any"),
    "an_attribute": (lambda x: x * x.some_attribute_of_ours, lambda x: x * 2, "exact"),
    "a_wrong_call": (lambda x: torch.matmul(x, torch.ones(3, 3)), lambda x: x * 2, "any"),
    "a_hash": (lambda x: x * (1 + {x: 1}[x]), lambda x: x, "exact"),
    "a_deep_copy": (lambda x: copy.deepcopy(x.detach()) * 2, lambda x: x, "any"),
}
for _name, (_attempt, _otherwise, _wanted) in TRIED.items():
    middles(KIND, {f"try_{_name}": partial(_tried, _attempt, _otherwise)}, wanted=_wanted)


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
