"""Element-wise operations: labels that meet are tied, and the result carries them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.rules.choices import told_apart
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels, Plane
from fxprune.rules.table import Key, rule, takes_index
from fxprune.rules.vocabulary import CASTS

_ARITHMETIC = (
    "add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "float_power", "maximum",
    "minimum", "fmax", "fmin", "atan2", "hypot", "copysign", "lerp", "addcmul", "addcdiv", "where", "logaddexp",
    "rsub", "subtract", "multiply", "divide", "xlogy", "heaviside", "eq", "ne", "gt", "ge", "lt", "le", "greater",
    "greater_equal", "less", "less_equal", "not_equal", "logical_and", "logical_or", "logical_xor", "logical_not",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "isclose", "masked_fill", "clamp", "clip", "clamp_min",
    "clamp_max", "nan_to_num", "isnan", "isinf", "isfinite", "polar", "complex", "logaddexp2", "ldexp", "arctan2",
)  # fmt: skip
_FUNCTIONS = (
    "abs", "absolute", "neg", "negative", "positive", "sign", "sgn", "sqrt", "rsqrt", "square", "reciprocal", "exp",
    "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "asinh", "acosh", "atanh", "arctan", "sigmoid", "logit", "erf", "erfc", "floor", "ceil", "round", "trunc",
    "frac", "sinc", "relu", "relu6", "elu", "selu", "celu", "silu", "mish", "gelu", "softplus", "softsign",
    "tanhshrink", "hardshrink", "softshrink", "hardtanh", "hardsigmoid", "hardswish", "leaky_relu", "rrelu",
    "threshold", "logsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "feature_dropout", "clone", "contiguous", "detach", "float", "double", "half", "bfloat16",
    "long", "int", "short", "char", "byte", "bool", "to", "type", "type_as", "cpu", "cuda", "requires_grad_",
    "rand_like", "randn_like",
    "deg2rad", "rad2deg", "bernoulli", "signbit", "angle", "conj", "resolve_conj", "lgamma", "digamma", "erfinv", "fix",
    "arcsin", "arccos", "arcsinh", "arccosh", "arctanh", "normal", "poisson", "uniform_", "exponential_", "detach_",
    "zero_", "fill_", "copy_",
)  # fmt: skip
_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "iadd", "isub", "imul", "itruediv",
    "ifloordiv", "imod", "ipow", "eq", "ne", "gt", "ge", "lt", "le", "and_", "or_", "xor", "inv", "invert", "iand",
    "ior", "ixor",
)  # fmt: skip
_SPECIAL = (
    "entr",
    "erf",
    "erfc",
    "erfcx",
    "erfinv",
    "expit",
    "expm1",
    "gammaln",
    "i0",
    "log1p",
    "log_ndtr",
    "logit",
    "ndtr",
)
_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.GELU, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU,
    nn.RReLU, nn.Threshold, nn.LogSigmoid, nn.Sigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def _keys() -> set[Key]:
    """Every spelling of torch's element-wise ops: functions, methods, in-place forms, operators, modules."""
    keys: set[Key] = {*_MODULES, *(getattr(operator, name) for name in _OPERATORS)}
    keys |= {f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv") for side in ("", "r")}
    keys |= {getattr(torch.special, name) for name in _SPECIAL}
    for name in _ARITHMETIC + _FUNCTIONS:
        names = name, f"{name.rstrip('_')}_"
        keys |= {n for n in names if hasattr(Tensor, n)}
        keys |= {getattr(home, n) for home in (torch, F) for n in names if callable(getattr(home, n, None))}
    return keys


@rule(*_keys(), torch.real, torch.imag)
@takes_index
def pointwise(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """The result has the labels of its operands, which meet in the broadcast shape."""
    if ctx.node.target in ("to", "type_as"):
        args, kwargs = args[:1], {}
        if args[0].value is not None and not args[0].planes:
            return args[0]
    inputs = labels_in((args, kwargs))
    if ctx.node.target in CASTS and inputs[0].index_of is not None:
        return inputs[0]
    if (found := told_apart(ctx, args)) is not None:
        return found
    ctx.freeze_numbered(inputs)
    shapes = [x.shape for x in inputs]
    return ctx.meet(inputs, shapes[0] if shapes.count(shapes[0]) == len(shapes) else torch.broadcast_shapes(*shapes))


@rule(nn.PReLU, F.prelu, torch.prelu, "prelu")
def prelu(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """Tie the slope of each channel to the channel, unless there is one slope for all."""
    x, weight = labels_in((args, kwargs))[0], ctx.own("weight") if ctx.node.op == "call_module" else args[1]
    if weight is not None and weight.shape and weight.shape[0] > 1 and x.ndim > 1:
        ctx.tie(ctx.vector(x, 1), ctx.vector(weight, 0))
    return x


@rule(F.glu, nn.GLU)
def glu(ctx: Context, *args: Any, **kwargs: Any) -> Labels:
    """The first half of an axis times the sigmoid of the second: tie the halves."""
    x = labels_in((args, kwargs))[0]
    dim = (args[0].dim if ctx.node.op == "call_module" else ctx.call.get("dim")) % x.ndim
    half = x.shape[dim] // 2
    shape = (*x.shape[:dim], half, *x.shape[dim + 1 :])
    halves = [
        [p if dim not in p.axes else Plane(p.core.narrow(dim, start, half), p.axes) for p in x.planes]
        for start in (0, half)
    ]
    return ctx.meet([Labels(shape, tuple(planes)) for planes in halves], shape)
