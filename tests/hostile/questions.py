"""Forwards that ask what a tensor is, what it has, and who is running them; the answers are those of eager mode."""

from __future__ import annotations

import collections.abc
import math
import numbers
import operator
import typing
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from hostile.case import Steps, add, hostile, masked, masked_by_bools, middles

KIND = "questions"


@runtime_checkable
class Shaped(Protocol):
    shape: Any

    def size(self) -> Any: ...


@runtime_checkable
class Estimator(Protocol):
    def fit(self, x: Any) -> Any: ...


class Special(Tensor):
    """A subclass that no activation here is of."""


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
    "isinstance_of_a_subclass": lambda x: isinstance(x, Special),
    "isinstance_float_tensor": lambda x: isinstance(x, torch.FloatTensor),
    "isinstance_proxy": lambda x: isinstance(x, torch.fx.Proxy),
    "isinstance_callable": lambda x: isinstance(x, collections.abc.Callable),
    "isinstance_protocol": lambda x: isinstance(x, Shaped),
    "isinstance_another_protocol": lambda x: isinstance(x, Estimator),
    "not_isinstance": lambda x: not isinstance(x, Tensor),
    "is_tensor": torch.is_tensor,
    "type_is": lambda x: type(x) is Tensor,
    "type_equals": lambda x: type(x) == Tensor,  # noqa: E721
    "type_name": lambda x: type(x).__name__ == "Tensor",
    "type_representation": lambda x: "Proxy" in repr(type(x)),
    "class_is": lambda x: x.__class__ is Tensor,
    "issubclass": lambda x: issubclass(type(x), Tensor),
    "jit_isinstance": lambda x: torch.jit.isinstance([x], list[Tensor]),
    "dispatch_table": lambda x: {Tensor: True}.get(type(x), False),
    "callable": callable,
    "has_an_unknown_attribute": lambda x: hasattr(x, "some_attribute_of_ours"),
    "getattr_default": lambda x: getattr(x, "scale", None) is not None,
    "dir": lambda x: "node" in dir(x),
    "torch_function_attribute": lambda x: type(x).__torch_function__ == Tensor.__torch_function__,
    "has_torch_function": lambda x: torch.overrides.has_torch_function((x,)),
}

OF_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "is_of_another_kind": lambda x: any(
        (x.is_cuda, x.is_meta, x.is_sparse, x.is_quantized, x.is_nested, x.is_complex())
    ),
    "memory": lambda x: x.is_contiguous() and x.data_ptr() == x.detach().data_ptr() and x[:, :4]._base is not None,
    "sizes_as_numbers": lambda x: divmod(x.shape[1], 3) == (2, 2) and x.shape[1] in range(4, 9) and not x.shape[1] & 7,
    "dtype_is": lambda x: x.dtype is torch.float32,
    "device_isinstance": lambda x: isinstance(x.device, torch.device),
    "dim_isinstance": lambda x: isinstance(x.dim(), int) and isinstance(x.ndim, int),
    "shape_is_size": lambda x: type(x.shape) is torch.Size,
    "shape_equals": lambda x: x.shape[1:] == (8, 8, 8),
    "size_isinstance_int": lambda x: isinstance(x.shape[1], int),
    "size_type_is_int": lambda x: type(x.size(1)) is int,
    "size_isinstance_integral": lambda x: isinstance(x.shape[1], numbers.Integral),
    "size_isinstance_symbol": lambda x: isinstance(x.shape[0], torch.SymInt),
    "batch_isinstance_int": lambda x: isinstance(x.shape[0], int),
    "size_in_a_text": lambda x: f"{x.shape[1]}" == "8" and "%d" % x.shape[2] == "8",  # noqa: UP031
    "size_in_a_set": lambda x: x.shape[1] in {8, 16},
    "size_in_mathematics": lambda x: math.isqrt(x.shape[1]) == 2 and math.prod(x.shape[1:]) == 512,
    "identity_after_in_place": lambda x: x.relu_() is x,
    "identity_after_augmented": lambda x: operator.imul(x, 2) is x,
    "identity_after_contiguous": lambda x: x.contiguous() is x,
    "representation": lambda x: repr(x).startswith("tensor("),
}

OF_THE_RUN: dict[str, Callable[[Any], Any]] = {
    "is_in_a_mode": lambda x: torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() > 0,
    "is_tracing": lambda x: torch.jit.is_tracing(),
    "is_scripting": lambda x: torch.jit.is_scripting(),
    "is_fx_tracing": lambda x: torch.fx._symbolic_trace.is_fx_tracing(),
    "is_compiling": lambda x: torch.compiler.is_compiling(),
    "is_exporting": lambda x: torch.compiler.is_exporting(),
}
OF_GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "grad_fn_is_none": lambda x: x.grad_fn is None,
    "is_leaf": lambda x: x.is_leaf,
    "requires_grad": lambda x: x.requires_grad,
    "is_grad_enabled": lambda x: torch.is_grad_enabled(),
}


def _doubled_where(question: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: x * 2 if question(x) else x


MAY = (
    "isinstance_float_tensor", "type_representation", "dir", "torch_function_attribute", "has_torch_function",
    "identity_after_contiguous", "representation", "type_is", "type_equals", "type_name", "class_is", "dispatch_table",
    "memory",
)  # fmt: skip
for questions in (OF_TYPES, OF_ATTRIBUTES, OF_THE_RUN):
    middles(KIND, {name: _doubled_where(question) for name, question in questions.items()}, MAY)
middles(KIND, {name: _doubled_where(question) for name, question in OF_GRADIENTS.items()}, wanted="any")

OF_MASKS: dict[str, Callable[[Any], Any]] = {
    "mask_isinstance": lambda mask: isinstance(mask, Tensor),
    "mask_is_tensor": torch.is_tensor,
    "mask_type_is": lambda mask: type(mask) is Tensor,
    "mask_is_not_none": lambda mask: mask is not None,
    "mask_has_a_dtype": lambda mask: hasattr(mask, "dtype") and mask.dtype.is_floating_point,
    "mask_is_not_callable": lambda mask: not callable(mask),
}
for _name, _question in OF_MASKS.items():

    def _build(question: Callable[[Any], Any] = _question) -> nn.Module:
        return Steps(lambda _, h, mask: h * mask[..., None] if question(mask) else h)

    add(KIND, _name, _build, masked, wanted="any" if _name == "mask_type_is" else "exact")


@hostile(KIND, masked_by_bools)
def mask_of_bools() -> nn.Module:
    def middle(_: Any, h: Tensor, mask: Any) -> Tensor:
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            return h.masked_fill(~mask[..., None], 0.0)
        return h

    return Steps(middle)


@hostile(KIND, masked, wanted="said")
def mask_of_which_any_counts() -> nn.Module:
    """In the example it does; at another batch, none may."""

    def middle(_: Any, h: Tensor, mask: Any) -> Tensor:
        return h * mask[..., None] if mask[0, 0] > 0 else h

    return Steps(middle)
