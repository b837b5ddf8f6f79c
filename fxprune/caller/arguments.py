"""Checks of the arguments that stages share, by name, all made before work begins.

Modules that define the choices or the class of an argument register its check themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.caller.batches import check_loader
from fxprune.caller.model_checks import check_forward, check_made
from fxprune.caller.tensors import in_transform
from fxprune.errors import (
    CalibrationError,
    CaptureError,
    FxpruneError,
    PlanError,
    a_kind,
    close_names,
    error_text,
    first_line,
)

Check = Callable[[str, Any], None]
CHECKS: dict[str, Check] = {}
_LONGEST, _FEW = 60, 3  # characters, and entries, of a value in a message


def check(function: Callable[..., Any], given: Mapping[str, Any], passed_to: Callable[..., Any] | None = None) -> None:
    """Raise where an argument that a function is `given` fails its check; None is allowed where it is the default.

    Further keywords are those of `passed_to`: an unknown one is a TypeError.

    >>> def plan(alpha=None, min_keep=1): ...
    >>> check(plan, {"alpha": None, "min_keep": 0})
    Traceback (most recent call last):
    fxprune.errors.PlanError: min_keep is 0; it is a whole number, at least 1 and below 2**31
    """
    if in_transform():
        raise FxpruneError(
            f"{function.__name__} is called inside of torch.vmap, or of a transform of torch.func: call it outside"
        )
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and passed_to is not None:
            check_keywords(function, given[name], inspect.signature(passed_to).parameters)
            check(passed_to, given[name])
        elif name in given and not (given[name] is None and parameter.default is None):
            check_value(name, given[name])


def check_keywords(function: Callable[..., Any], given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise TypeError, with the names that are close to it, where a keyword is none of a function's, or of others.

    >>> def plan(alpha=None, min_keep=1): ...
    >>> check_keywords(plan, ["alhpa"])
    Traceback (most recent call last):
    TypeError: plan() got an unexpected keyword argument 'alhpa'; close names: 'alpha'
    """
    known = [*inspect.signature(function).parameters, *others]
    for name in given:
        if name not in known:
            close = close_names(name, known)
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{close}")


def check_value(name: str, value: Any) -> None:
    """Raise where a value fails the check of an argument's name; a name without a check takes anything."""
    if name not in CHECKS:
        return
    try:
        CHECKS[name](name, value)
    except (FxpruneError, TypeError):
        raise
    except Exception as error:
        raise FxpruneError(f"{name} cannot be looked at: it raises {error_text(error)}") from error


def wanted(fits: Callable[[Any], bool], what: str, error: type[FxpruneError] = FxpruneError) -> Check:
    """The check that a value fits; `what` describes the values that do."""

    def check_fits(name: str, value: Any) -> None:
        if not fits(value):
            raise error(f"{name} is {shown(value)}; {what}")

    return check_fits


def chosen(choices: Iterable[str], error: type[FxpruneError], function: str = "") -> Check:
    """The check for one of some names, or for a function where its description is given."""

    def check_chosen(name: str, value: Any) -> None:
        if not (value in choices if isinstance(value, str) else function and callable(value)):
            others = f", or {function}" if function else ""
            close = close_names(value, choices) if isinstance(value, str) else ""
            raise error(f"{name} is {shown(value)}{close}; it is one of {', '.join(choices)}{others}")

    return check_chosen


def instance(kind: type, remedy: str, error: type[FxpruneError] = FxpruneError) -> Check:
    """The check for an object of a class."""
    return wanted(lambda value: isinstance(value, kind), remedy, error)


def shown(value: Any) -> str:
    """A value for a message: plain values up to a length, the type of any other.

    >>> shown("a" * 99), shown([3, None, torch.zeros(2)])
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", '[3, None, a Tensor]')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (tuple, list)):
        more = ", ..." if len(value) > _FEW else ""
        return f"[{', '.join(map(shown, value[:_FEW]))}{more}]"
    if isinstance(value, int) and value.bit_length() > _LONGEST * 4:
        return f"a whole number of {value.bit_length():,} bits"  # Python refuses to print the longest
    if isinstance(value, (str, bytes, int, float, complex, np.generic, type(None))):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{a_kind(value)}"


def is_whole(value: Any, least: int = 1, below: float = math.inf) -> bool:
    """Whether a value is a whole number in a range; True and False are not."""
    return type(value) is not bool and isinstance(value, Integral) and least <= int(value) < below


def is_number(value: Any) -> bool:
    """Whether a value is a real number that a float can hold, and not NaN, True or False."""
    if type(value) is bool or not isinstance(value, Real):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def is_keywords(value: Any) -> bool:
    """Whether a value is a mapping whose keys are strings."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_collection(value: Any) -> bool:
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))


def _count(error: type[FxpruneError]) -> Check:
    return wanted(lambda n: is_whole(n, below=1 << 31), "it is a whole number, at least 1 and below 2**31", error)


def _number(fits: Callable[[Any], bool], what: str, error: type[FxpruneError] = FxpruneError) -> Check:
    return wanted(lambda x: is_number(x) and fits(x), what, error)


def _share(what: str) -> Check:
    """The check for a share, which is no percentage."""

    def check_share(name: str, value: Any) -> None:
        if not (is_number(value) and 0 < value <= 1):
            percent = f"; for {value:g} % pass {value / 100:g}" if is_number(value) and 1 < value <= 100 else ""
            what_fits = f"it is a share of the original's {what}: more than 0, at most 1"
            raise PlanError(f"{name} is {shown(value)}; {what_fits}{percent}")

    return check_share


def _names(*, types: str = "") -> Check:
    """The check for one or several names, or module types where `types` says that they are allowed."""

    def fits(entry: Any) -> bool:
        return isinstance(entry, str) or (bool(types) and isinstance(entry, type) and issubclass(entry, nn.Module))

    return wanted(
        lambda value: fits(value) or (_is_collection(value) and all(map(fits, value))),
        f"it is a name or glob pattern of names{types}, or a list of them",
    )


def _function(what: str) -> Check:
    return wanted(callable, f"it is a function, {what}", CalibrationError)


def check_model(name: str, value: Any) -> None:
    """Raise CaptureError where a value is not a model that can be captured; the message says how to make one of it."""
    if isinstance(value, torch.jit.ScriptModule):
        kind = value.original_name
        remedy = f"it is scripted or traced, and torch.fx cannot look into it: give the {kind} that it was made from"
    elif isinstance(value, nn.Module):
        check_made(value)
        return check_forward(value)
    elif isinstance(value, type) and issubclass(value, nn.Module):
        remedy = f"give an instance of it, {value.__name__}(...)"
    elif isinstance(value, Mapping):
        remedy = "build the model, and load the weights with model.load_state_dict"
    elif isinstance(value, (str, bytes, PathLike)):
        remedy = "build the model, and load its weights with model.load_state_dict(torch.load(path))"
    else:
        remedy = "give a model, an nn.Module"
    raise CaptureError(f"{name} is {shown(value)}; {remedy}")


def check_module(name: str, value: Any) -> None:
    """Raise where a value is not a module, or is one whose contents cannot be listed."""
    instance(nn.Module, "give a model, an nn.Module")(name, value)
    check_made(value)


def check_device(name: str, value: Any) -> None:
    """Raise where a device does not exist, or is the meta device."""
    try:
        found = torch.empty(0, device=value).device
    except Exception as error:
        text = f"{name} is {shown(value)}, which cannot be used ({first_line(error)}): name another"
        raise FxpruneError(text) from error
    if found.type == "meta":
        raise FxpruneError(f"{name} is {shown(value)}, where nothing has numbers: name a device that computes")


def _each(names: str, check: Check) -> dict[str, Check]:
    """One check for several arguments."""
    return dict.fromkeys(names.split(), check)


_FLAGS = (
    "inexact head_dim query_heads verify prove build progress note dynamic_batch resume own_class new_biases "
    "equal_blocks"
)
CHECKS |= {
    "alpha": _number(lambda x: 0 <= x <= 1, "it is a share of units and lies between 0 and 1", PlanError),
    **{name: _share(what) for name, what in (("params", "parameters"), ("macs", "MACs"), ("latency", "latency"))},
    **_each("min_keep rounds", _count(PlanError)),
    **_each("samples_per_class projections max_classes max_samples every", _count(CalibrationError)),
    **_each("repeats epochs patience threads", _count(FxpruneError)),
    "sample_memory": wanted(is_whole, "it is a whole number of bytes, at least 1", CalibrationError),
    "seed": wanted(lambda n: is_whole(n, 0, 1 << 63), "it is a whole number from 0 to 2**63 - 1"),
    "lr": _number(lambda x: 0 < x < math.inf, "the learning rate is a positive number"),
    "temperature": _number(lambda x: 0 < x < math.inf, "it divides logits, and is a positive number"),
    "distill": _number(lambda x: 0 < x <= 1, "it is the teacher's share in the loss, above 0 and at most 1"),
    "tolerance": _number(lambda x: x >= 0, "it is a number, at least 0"),
    "seconds": _number(lambda x: x >= 0, "it is a number of seconds, at least 0"),
    "batch_sizes": wanted(
        lambda sizes: _is_collection(sizes) and len(sizes) > 0 and all(is_whole(n, below=1 << 31) for n in sizes),
        "it is a list of whole numbers, at least 1 and below 2**31",
    ),
    **_each(_FLAGS, wanted(lambda flag: isinstance(flag, (bool, np.bool_)), "it is True or False")),
    "unknown": chosen(("error", "freeze"), FxpruneError),
    "loss": _function("loss(output, targets)"),
    "unpack": _function("unpack(batch), which gives (inputs, targets)"),
    "classes": _function("classes(targets), which gives the class of each sample"),
    "run": _function("run(model, inputs, targets), which gives the mean loss of the batch"),
    "metric": _function("metric(original, pruned) of outputs, and of finetune metric(output, targets)"),
    "evaluate": _function("evaluate(model), which gives a number"),
    "logits": _function("logits(output)"),
    "optimizer": _function("optimizer(parameters), which gives a torch.optim.Optimizer"),
    **_each("exclude leaves", _names(types=", or module types")),
    "ignore": _names(),
    "loader": lambda _, value: check_loader(value),
    **_each("train_loader val_loader", lambda name, value: check_loader(value, name)),
    "model": check_model,
    "device": check_device,
    "submodule": wanted(lambda path: isinstance(path, str), "it is the path of a module, such as 'backbone.layer1'"),
    "concrete_args": wanted(is_keywords, "it is a dict of names of arguments and their values", CaptureError),
    "finetune": wanted(is_keywords, "it is a dict of arguments of fxprune.finetune"),
    "checkpoint": wanted(lambda path: isinstance(path, (str, PathLike)), "it is the path of a file", CalibrationError),
    **_each("small original teacher weights", check_module),
}
