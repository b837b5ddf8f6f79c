"""The ops of torch.export as what a user would have written: functions, methods and operators that rules know."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import GetSetDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from fxprune.errors import CaptureError
from fxprune.rules.table import RULES


@dataclass(frozen=True, slots=True)
class Call:
    """One node to be: `op` is that of `fx.Node`, or "new_module" where `target` is a module to add first."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Same:
    """No node: the op hands on a value as it is."""

    value: Any


Spell = Callable[..., Call | Same]
SPELLINGS: dict[str, Spell] = {}

# Checks that export adds; the sizes that they look at are the example's.
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
    """Whether a node makes a tensor of numbers that are all known."""
    target = node.target
    return isinstance(target, OpOverload) and name_of(target) in CREATIONS and not node.all_input_nodes


def is_changed(node: fx.Node) -> bool:
    """Whether something writes into the tensor of a node, or into a view of it."""
    return any(
        user.args[:1] == (node,) and (_writes(user.target) or (_is_view(user.target) and is_changed(user)))
        for user in node.users
    )


def _writes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_view(target: Any) -> bool:
    return target is operator.getitem or (
        isinstance(target, OpOverload) and any(a.alias_info is not None for a in target._schema.arguments)
    )


def spelled(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | Same:
    """What an op of an exported program is in plain PyTorch. Ops from outside of PyTorch stay what they are.

    Raises CaptureError where PyTorch has nothing that takes the same arguments.

    >>> spelled(torch.ops.aten.select.int, ("x", 1, 3), {})
    Call(op='call_function', target=<built-in function getitem>, args=('x', (slice(None, None, None), 3)), kwargs={})
    """
    name = name_of(target)
    if target.namespace != "aten":
        return Call("call_function", target, args, kwargs)
    if name in SPELLINGS:
        return SPELLINGS[name](*args, **kwargs)
    if name in _OPERATORS and not kwargs:
        return Call("call_function", _OPERATORS[name], args)
    found = list(_in_place(target, args, kwargs) if _is_in_place(name) else _functions(target, args, kwargs))
    if not found:
        raise CaptureError(f"the exported program holds {target}, for which PyTorch has no function or method")
    return next((call for call in found if call.target in RULES), found[0])


# -- ops that PyTorch has under the same name --------------------------------------------------------------------------


def _functions(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """The functions that take the op's arguments in their order, then the method."""
    name = name_of(target)
    family, _, short = name.partition("_")
    homes: list[tuple[Any, str]] = [(F, name), (torch, name), (torch._C._nn, name)]
    if family in ("linalg", "special", "fft"):
        homes.append((getattr(torch, family), short))
    for home, key in homes:
        function = getattr(home, key, None)
        if callable(function) and _takes(function, target, args, kwargs):
            yield Call("call_function", function, args, kwargs)
    if isinstance(inspect.getattr_static(torch.Tensor, name, None), GetSetDescriptorType):
        yield Call("call_function", getattr, (args[0], name))
    elif hasattr(torch.Tensor, name):
        yield Call("call_method", name, args, kwargs)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _in_place(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """The method with an underscore, or the function with `inplace=True`."""
    name = name_of(target)
    function = getattr(F, name[:-1], None)
    if callable(function) and _takes(function, target, args, kwargs | {"inplace": True}):
        yield Call("call_function", function, args, kwargs | {"inplace": True})
    if hasattr(torch.Tensor, name):
        yield Call("call_method", name, args, kwargs)


def _takes(function: Any, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function's arguments are the op's: those written in C++ are made of the same schema."""
    if not inspect.isfunction(function):
        return "inplace" not in kwargs
    names = list(inspect.signature(function).parameters)
    wanted = [argument.name for argument in target._schema.arguments[: len(args)]]
    wanted = ["input" if name == "self" else name for name in wanted]
    return names[: len(args)] == wanted and kwargs.keys() <= set(names[len(args) :])


# -- ops that are written in another way -------------------------------------------------------------------------------


def spells(*names: str) -> Callable[[Spell], Spell]:
    """Register the decorated function, which takes an op's arguments, as the way to write these ops."""

    def register(function: Spell) -> Spell:
        SPELLINGS.update(dict.fromkeys(names, function))
        return function

    return register


def _method(name: str, *args: Any, **kwargs: Any) -> Call:
    return Call("call_method", name, args, kwargs)


def _function(target: Any, *args: Any, **kwargs: Any) -> Call:
    return Call("call_function", target, args, kwargs)


def _sized(name: str) -> Spell:
    """A method whose sizes are its arguments: x.view(2, 3)."""

    def spell(x: Any, size: Any, **kwargs: Any) -> Call:
        return _method(name, x, *size) if isinstance(size, (tuple, list)) else _method(name, x, size)

    return spell


def _renamed(name: str) -> Spell:
    """A method of another name, or one that rewriting knows better than the function."""
    return lambda *args, **kwargs: _method(name, *args, **kwargs)


for _op, _name in {
    "view": "view", "_unsafe_view": "reshape", "reshape": "reshape", "expand": "expand", "repeat": "repeat",
}.items():  # fmt: skip
    spells(_op)(_sized(_name))
for _op, _name in {
    "split": "split", "split_with_sizes": "split", "unsafe_split": "split", "chunk": "chunk", "unsafe_chunk": "chunk",
    "tensor_split": "tensor_split", "lift_fresh_copy": "clone", "clone": "clone", "contiguous": "contiguous",
    "detach": "detach", "sym_size": "size", "sym_numel": "numel", "sym_storage_offset": "storage_offset",
    "sym_stride": "stride", "_local_scalar_dense": "item", "item": "item",
}.items():  # fmt: skip
    spells(_op)(_renamed(_name))


@spells("alias", "lift", "lift_fresh", "_conj", "resolve_conj", "resolve_neg")
def same(x: Any) -> Same:
    """Nothing happens to numbers that are real."""
    return Same(x)


@spells("slice")
def piece(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Call | Same:
    """x[..., start:end:step]; x itself where that is all of it."""
    entry = slice(None if start == 0 else start, None if end == _LAST else end, None if step == 1 else step)
    return Same(x) if entry == slice(None) else _function(operator.getitem, x, _at(dim, entry))


@spells("select")
def entry(x: Any, dim: int, index: Any) -> Call:
    """x[..., index]."""
    return _function(operator.getitem, x, _at(dim, index))


def _at(dim: int, index: Any) -> tuple[Any, ...]:
    """The index that takes `index` along axis `dim` and all of every other axis."""
    if dim < 0:
        return (Ellipsis, index, *[slice(None)] * (-dim - 1))
    return (*[slice(None)] * dim, index)


@spells("index")
def indexed(x: Any, indices: Sequence[Any]) -> Call:
    """x[:, index]."""
    return _function(operator.getitem, x, tuple(slice(None) if index is None else index for index in indices))


@spells("to", "_to_copy")
def moved(x: Any, *args: Any, layout: Any = None, pin_memory: Any = None, device: Any = None, **kwargs: Any) -> Call:
    """x.to(dtype); the device is the model's."""
    args = tuple(value for value in args if not isinstance(value, torch.device))
    given = {name: value for name, value in kwargs.items() if value is not None}
    return _method("to", x, *args, **given) if args or given else _method("clone", x)


@spells("einsum")
def einsum(equation: str, tensors: Sequence[Any], **kwargs: Any) -> Call:
    """The tensors are arguments of their own."""
    return _function(torch.einsum, equation, *tensors)


@spells("tensordot")
def tensordot(x: Any, y: Any, own: Sequence[int], other: Sequence[int]) -> Call:
    """The axes of both tensors are one argument."""
    return _function(torch.tensordot, x, y, (list(own), list(other)))


@spells("grid_sampler")
def grid_sample(x: Any, grid: Any, mode: int, padding: int, align: bool) -> Call:  # noqa: FBT001 - as export calls it
    """Modes have names."""
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return _function(F.grid_sample, x, grid, modes[mode], paddings[padding], align)


@spells("batch_norm")
def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, cudnn: Any
) -> Call:
    """Of the batch."""
    return _function(F.batch_norm, x, mean, var, weight, bias, training, momentum, eps)


@spells("instance_norm")
def instance_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, use: Any, momentum: Any, eps: Any, cudnn: Any
) -> Call:
    """Of each sample."""
    return _function(F.instance_norm, x, mean, var, weight, bias, use, momentum, eps)


@spells("layer_norm")
def layer_norm(x: Any, shape: Any, *rest: Any, cudnn_enable: Any = None, **kwargs: Any) -> Call:
    """Without the choice of a backend."""
    return _function(F.layer_norm, x, shape, *rest[:3], **kwargs)


@spells("group_norm")
def group_norm(x: Any, groups: int, *rest: Any, cudnn_enabled: Any = None, **kwargs: Any) -> Call:
    """Without the choice of a backend."""
    return _function(F.group_norm, x, groups, *rest[:3], **kwargs)


@spells("embedding")
def embedding(weight: Any, x: Any, padding_idx: int = -1, *flags: Any) -> Call:
    """The numbers come first."""
    padding = None if padding_idx == -1 else padding_idx
    return _function(
        F.embedding, x, weight, padding, **dict(zip(("scale_grad_by_freq", "sparse"), flags, strict=False))
    )


@spells("im2col")
def unfold(x: Any, *args: Any) -> Call:
    """The arguments are the same."""
    return _function(F.unfold, x, *args)


@spells("col2im")
def fold(x: Any, *args: Any) -> Call:
    """The arguments are the same."""
    return _function(F.fold, x, *args)


@spells("log_sigmoid")
def log_sigmoid(x: Any) -> Call:
    """Another name."""
    return _function(F.logsigmoid, x)


@spells("_softmax")
def softmax(x: Any, dim: int, half_to_float: Any) -> Call:
    """Without the type of a backend."""
    return _function(torch.softmax, x, dim)


@spells("_log_softmax")
def log_softmax(x: Any, dim: int, half_to_float: Any) -> Call:
    """Without the type of a backend."""
    return _function(torch.log_softmax, x, dim)


@spells("numpy_T")
def transposed(x: Any) -> Call:
    """x.T."""
    return _function(getattr, x, "T")


@spells("constant_pad_nd")
def constant_pad(x: Any, pad: Any, value: Any = 0) -> Call:
    """F.pad in its default mode."""
    return _function(F.pad, x, pad, "constant", value)


def _padding(mode: str) -> Spell:
    return lambda x, padding: _function(F.pad, x, padding, mode)


def _resized(mode: str, *, corners: bool) -> Spell:
    def spell(x: Any, size: Any, *rest: Any) -> Call:
        align, scales = rest if corners else (None, *rest)
        return _function(F.interpolate, x, size, None if size is not None else scales, mode, align)

    return spell


for _nd, _linear in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    spells(f"reflection_pad{_nd}d")(_padding("reflect"))
    spells(f"replication_pad{_nd}d")(_padding("replicate"))
    spells(f"upsample_nearest{_nd}d")(_resized("nearest", corners=False))
    spells(f"_upsample_nearest_exact{_nd}d")(_resized("nearest-exact", corners=False))
    spells(f"upsample_{_linear}{_nd}d")(_resized(_linear, corners=True))
spells("upsample_bicubic2d")(_resized("bicubic", corners=True))


def _dropped(kind: type[nn.Module], function: Any, *, inplace: bool) -> Spell:
    """A dropout whose flag tracing has fixed becomes a module that follows the model's mode, or drops in any mode."""

    def spell(x: Any, p: float, train: Any) -> Call:
        if train:
            return Call("call_function", function, (x, p, True, inplace))
        known = getattr(x, "meta", {}).get("val")
        rank = known.ndim if kind is nn.Dropout2d and isinstance(known, torch.Tensor) else 4
        of_rank = {2: nn.Dropout1d, 3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, kind)
        return Call("new_module", of_rank(p, inplace), (x,))  # type: ignore[call-arg]

    return spell


for _op, _kind, _always in (
    ("dropout", nn.Dropout, F.dropout), ("feature_dropout", nn.Dropout2d, F.dropout2d),
    ("alpha_dropout", nn.AlphaDropout, F.alpha_dropout),
    ("feature_alpha_dropout", nn.FeatureAlphaDropout, F.feature_alpha_dropout),
):  # fmt: skip
    spells(_op)(_dropped(_kind, _always, inplace=False))
    spells(f"{_op}_")(_dropped(_kind, _always, inplace=True))
