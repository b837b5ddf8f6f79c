"""The ops of torch.export as a user writes them: functions, methods and operators that have rules."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import GetSetDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from fxprune.errors import CaptureError
from fxprune.rules.table import RULES


@dataclass(frozen=True, slots=True)
class Spelling:
    """One node to make: `op` is that of `fx.Node`, or "new_module" where `target` is a module to add first."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unchanged:
    """No node: the op returns its input as it is."""

    value: Any


# Checks that export adds, of the example's sizes.
ASSERTIONS = {
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_functional_assert_async",
    "_functional_assert_scalar", "_functional_sym_constrain_range", "sym_constrain_range",
    "sym_constrain_range_for_size",
}  # fmt: skip
CREATIONS = {"arange", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "zeros", "tril_indices"}
_OPERATORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "neg": operator.neg, "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "ge": operator.ge, "lt": operator.lt,
    "le": operator.le, "floor_divide": operator.floordiv, "remainder": operator.mod, "bitwise_and": operator.and_,
    "bitwise_or": operator.or_, "bitwise_xor": operator.xor, "bitwise_not": operator.invert, "__and__": operator.and_,
    "__or__": operator.or_, "__xor__": operator.xor, "__iand__": operator.iand, "__ior__": operator.ior,
    "__ixor__": operator.ixor,
}  # fmt: skip
_LAST = 2**63 - 1  # the end of a slice that has none


def name_of(target: OpOverload) -> str:
    """The name of an op without its namespace and overload.

    >>> name_of(torch.ops.aten.add_.Tensor)
    'add_'
    """
    return str(target._schema.name).partition("::")[2]


def is_assertion(target: Any) -> bool:
    """Whether a node only checks sizes or dtypes."""
    return isinstance(target, OpOverload) and target.namespace == "aten" and name_of(target) in ASSERTIONS


def is_creation(node: fx.Node) -> bool:
    """Whether a node makes a tensor of known numbers alone."""
    target = node.target
    return isinstance(target, OpOverload) and name_of(target) in CREATIONS and not node.all_input_nodes


def is_changed(node: fx.Node) -> bool:
    """Whether an op writes into the tensor of a node, or into a view of it."""
    return any(_is_changed_by(user) for user in node.users if user.args[:1] == (node,))


def _is_changed_by(user: fx.Node) -> bool:
    """Whether a node writes into its first input, or gives a view of it that is written into."""
    schema = getattr(user.target, "_schema", None)
    is_view = user.target is operator.getitem or (schema and any(a.alias_info for a in schema.arguments))
    return bool((schema and schema.is_mutable) or (is_view and is_changed(user)))


def spelled(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelling | Unchanged:
    """An op of an exported program in plain PyTorch; ops from outside of PyTorch are kept.

    Raises CaptureError where PyTorch has no function or method that takes the same arguments.

    >>> found = spelled(torch.ops.aten.select.int, ("x", 1, 3), {})
    >>> found.target, found.args
    (<built-in function getitem>, ('x', (slice(None, None, None), 3)))
    """
    name = name_of(target)
    if target.namespace != "aten":
        return Spelling("call_function", target, args, kwargs)
    if name in SPELLINGS:
        return SPELLINGS[name](*args, **kwargs)
    if name in _OPERATORS and not kwargs:
        return Spelling("call_function", _OPERATORS[name], args)
    in_place = name.endswith("_") and not name.endswith("__")
    found = list((_in_place if in_place else _functions)(target, args, kwargs))
    if not found:
        raise CaptureError(f"the exported program holds {target}, for which PyTorch has no function or method")
    return next((call for call in found if call.target in RULES), found[0])


# -- ops that PyTorch has under the same name --------------------------------------------------------------------------


def _functions(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Spelling]:
    """The functions that take the op's arguments in their order, then the method."""
    name = name_of(target)
    family, _, short = name.partition("_")
    homes: list[tuple[Any, str]] = [(F, name), (torch, name), (torch._C._nn, name)]
    if family in ("linalg", "special", "fft"):
        homes.append((getattr(torch, family), short))
    for home, key in homes:
        function = getattr(home, key, None)
        if callable(function) and _takes(function, target, args, kwargs):
            yield Spelling("call_function", function, args, kwargs)
    if isinstance(inspect.getattr_static(torch.Tensor, name, None), GetSetDescriptorType):
        yield Spelling("call_function", getattr, (args[0], name))
    elif hasattr(torch.Tensor, name):
        yield Spelling("call_method", name, args, kwargs)


def _in_place(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Spelling]:
    """The method with an underscore, or the function with `inplace=True`."""
    name = name_of(target)
    function = getattr(F, name[:-1], None)
    if callable(function) and _takes(function, target, args, kwargs | {"inplace": True}):
        yield Spelling("call_function", function, args, kwargs | {"inplace": True})
    if hasattr(torch.Tensor, name):
        yield Spelling("call_method", name, args, kwargs)


def _takes(function: Any, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function's arguments are the op's: those written in C++ are made of the same schema."""
    if not inspect.isfunction(function):
        return "inplace" not in kwargs
    names = list(inspect.signature(function).parameters)
    wanted = [argument.name for argument in target._schema.arguments[: len(args)]]
    wanted = ["input" if name == "self" else name for name in wanted]
    return names[: len(args)] == wanted and kwargs.keys() <= set(names[len(args) :])


# -- ops that are written in another way -------------------------------------------------------------------------------

Speller = Callable[..., Spelling | Unchanged]


def _method(name: str, *args: Any, **kwargs: Any) -> Spelling:
    return Spelling("call_method", name, args, kwargs)


def _function(target: Any, *args: Any, **kwargs: Any) -> Spelling:
    return Spelling("call_function", target, args, kwargs)


def _sized(name: str, x: Any, size: Any, **kwargs: Any) -> Spelling:
    """A method whose sizes are its arguments: x.view(2, 3)."""
    return _method(name, x, *size) if isinstance(size, (tuple, list)) else _method(name, x, size)


def _sliced(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Spelling | Unchanged:
    """x[..., start:end:step]; x itself where that is all of it."""
    entry = slice(None if start == 0 else start, None if end == _LAST else end, None if step == 1 else step)
    return Unchanged(x) if entry == slice(None) else _indexed(x, dim, entry)


def _indexed(x: Any, dim: int, index: Any) -> Spelling:
    """`index` along axis `dim`, and all of every other axis."""
    after = (Ellipsis, index, *[slice(None)] * (-dim - 1))
    return _function(operator.getitem, x, after if dim < 0 else (*[slice(None)] * dim, index))


def _converted(
    x: Any, *args: Any, device: Any = None, layout: Any = None, pin_memory: Any = None, **kwargs: Any
) -> Any:
    """x.to(dtype); the device is the model's."""
    args = tuple(value for value in args if not isinstance(value, torch.device))
    given = {name: value for name, value in kwargs.items() if value is not None}
    return _method("to", x, *args, **given) if args or given else _method("clone", x)


def _grid_sampled(x: Any, grid: Any, mode: int, padding: int, *align: Any) -> Spelling:
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return _function(F.grid_sample, x, grid, modes[mode], paddings[padding], *align)


def _normalised(target: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Spelling:
    """Batch or instance normalisation; the last argument chooses a backend."""
    return _function(target, x, mean, var, weight, bias, *rest[:3])


def _embedded(weight: Any, x: Any, padding_idx: int = -1, *flags: Any) -> Spelling:
    named = dict(zip(("scale_grad_by_freq", "sparse"), flags, strict=False))
    return _function(F.embedding, x, weight, None if padding_idx == -1 else padding_idx, **named)


def _resized(mode: str, x: Any, size: Any, *rest: Any) -> Spelling:
    align, scales = rest if "linear" in mode or "cubic" in mode else (None, *rest)
    return _function(F.interpolate, x, size, None if size is not None else scales, mode, align)


def _dropped(kind: type[nn.Module], function: Any, x: Any, p: float, train: Any, *, inplace: bool = False) -> Spelling:
    """A dropout whose flag tracing has fixed becomes a module that follows the model's mode, or drops in any mode."""
    if train:
        return _function(function, x, p, True, inplace)  # noqa: FBT003 - takes them by place
    known = getattr(x, "meta", {}).get("val")
    rank = known.ndim if kind is nn.Dropout2d and isinstance(known, torch.Tensor) else 4
    of_rank = {2: nn.Dropout1d, 3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, kind)
    return Spelling("new_module", of_rank(p, inplace), (x,))  # type: ignore[call-arg]


_METHODS = {
    **{name: name for name in ("split", "chunk", "tensor_split", "clone", "contiguous", "detach", "item")},
    "split_with_sizes": "split", "unsafe_split": "split", "unsafe_chunk": "chunk", "lift_fresh_copy": "clone",
    "sym_size": "size", "sym_numel": "numel", "sym_storage_offset": "storage_offset", "sym_stride": "stride",
    "_local_scalar_dense": "item",
}  # fmt: skip
_DROPOUTS: dict[str, tuple[type[nn.Module], Any]] = {
    "dropout": (nn.Dropout, F.dropout), "feature_dropout": (nn.Dropout2d, F.dropout2d),
    "alpha_dropout": (nn.AlphaDropout, F.alpha_dropout),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout, F.feature_alpha_dropout),
}  # fmt: skip
_RESIZES = {
    f"{op}{nd}d": mode
    for nd, linear in ((1, "linear"), (2, "bilinear"), (3, "trilinear"))
    for op, mode in (
        ("upsample_nearest", "nearest"), ("_upsample_nearest_exact", "nearest-exact"), (f"upsample_{linear}", linear)
    )
} | {"upsample_bicubic2d": "bicubic"}  # fmt: skip
SPELLINGS: dict[str, Speller] = {
    **{op: partial(_method, name) for op, name in _METHODS.items()},
    **{op: partial(_sized, op) for op in ("view", "reshape", "expand", "repeat")},
    "_unsafe_view": partial(_sized, "reshape"),
    **dict.fromkeys(("alias", "lift", "lift_fresh", "_conj", "resolve_conj", "resolve_neg"), Unchanged),
    "slice": _sliced,
    "select": _indexed,
    "index": lambda x, at: _function(operator.getitem, x, tuple(slice(None) if i is None else i for i in at)),
    "numpy_T": lambda x: _function(getattr, x, "T"),
    **dict.fromkeys(("to", "_to_copy"), _converted),
    "einsum": lambda equation, tensors, **kwargs: _function(torch.einsum, equation, *tensors),
    "tensordot": lambda x, y, own, other: _function(torch.tensordot, x, y, (list(own), list(other))),
    "im2col": partial(_function, F.unfold),
    "col2im": partial(_function, F.fold),
    "log_sigmoid": partial(_function, F.logsigmoid),
    "_softmax": lambda x, dim, half_to_float: _function(torch.softmax, x, dim),
    "_log_softmax": lambda x, dim, half_to_float: _function(torch.log_softmax, x, dim),
    "batch_norm": partial(_normalised, F.batch_norm),
    "instance_norm": partial(_normalised, F.instance_norm),
    "layer_norm": lambda x, shape, *rest, cudnn_enable=None, **kw: _function(F.layer_norm, x, shape, *rest[:3], **kw),
    "group_norm": lambda x, n, *rest, cudnn_enabled=None, **kw: _function(F.group_norm, x, n, *rest[:3], **kw),
    "embedding": _embedded,
    "grid_sampler": _grid_sampled,
    "constant_pad_nd": lambda x, pad, value=0: _function(F.pad, x, pad, "constant", value),
    **{f"reflection_pad{nd}d": lambda x, pad: _function(F.pad, x, pad, "reflect") for nd in (1, 2, 3)},
    **{f"replication_pad{nd}d": lambda x, pad: _function(F.pad, x, pad, "replicate") for nd in (1, 2, 3)},
    **{op: partial(_resized, mode) for op, mode in _RESIZES.items()},
    **{op: partial(_dropped, *made) for op, made in _DROPOUTS.items()},
    **{f"{op}_": partial(_dropped, *made, inplace=True) for op, made in _DROPOUTS.items()},
}
