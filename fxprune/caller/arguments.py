"""The arguments that the stages share: one table says what each has to be, and all are looked at before work begins.

What enumerates the choices of an argument, or is the class that it has to be of, registers it in its own module.
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
from fxprune.errors import CalibrationError, CaptureError, FxpruneError, PlanError, first_line

Check = Callable[[str, Any], None]
CHECKS: dict[str, Check] = {}
_LONGEST, _FEW = 60, 3  # characters, and entries, of a value in a message
_COUNTS, _SEEDS = 1 << 31, 1 << 63


def check(function: Callable[..., Any], given: Mapping[str, Any], passed_to: Callable[..., Any] | None = None) -> None:
    """Raise where an argument of a function, called with those that are `given`, is not what it has to be.

    None is what an argument may be whose default it is. Further keywords are those of `passed_to`, or a TypeError.

    >>> def plan(alpha=None, min_keep=1): ...
    >>> check(plan, {"alpha": None, "min_keep": 0})
    Traceback (most recent call last):
    fxprune.errors.PlanError: min_keep is 0; it is a whole number, at least 1 and below 2**31
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and passed_to is not None:
            _check_passed(function, given[name], passed_to)
        elif name in given and not (given[name] is None and parameter.default is None):
            check_value(name, given[name])


def _check_passed(function: Callable[..., Any], given: Mapping[str, Any], passed_to: Callable[..., Any]) -> None:
    """Check what a function passes to another. Raises TypeError, which names the first, for what that does not take."""
    known = inspect.signature(passed_to).parameters
    for name in given:
        if name not in known:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
    check(passed_to, given)


def check_value(name: str, value: Any) -> None:
    """Raise where a value is not what the argument of a name has to be; of a name that is not known, anything is."""
    if name in CHECKS:
        CHECKS[name](name, value)


def wanted(fits: Callable[[Any], bool], what: str, error: type[FxpruneError] = FxpruneError) -> Check:
    """The check that a value fits; `what` says in words what it has to be."""

    def check_fits(name: str, value: Any) -> None:
        if not fits(value):
            raise error(f"{name} is {shown(value)}; {what}")

    return check_fits


def chosen(choices: Iterable[str], error: type[FxpruneError], function: str = "") -> Check:
    """The check for one of some names, or for a function, described in words, where there may be one."""

    def check_chosen(name: str, value: Any) -> None:
        if not (value in choices if isinstance(value, str) else function and callable(value)):
            others = f", or {function}" if function else ""
            raise error(f"{name} is {shown(value)}; it is one of {', '.join(choices)}{others}")

    return check_chosen


def instance(kind: type, remedy: str, error: type[FxpruneError] = FxpruneError) -> Check:
    """The check for an object of a class."""
    return wanted(lambda value: isinstance(value, kind), remedy, error)


def shown(value: Any) -> str:
    """A value as messages have it: plain ones as they are, up to a length, and of all others the type.

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
    return f"a {type(value).__name__}"


# -- numbers -----------------------------------------------------------------------------------------------------------


def is_whole(value: Any, least: int = 1, below: float = math.inf) -> bool:
    """Whether a value is a whole number in a range; True and False are none."""
    return type(value) is not bool and isinstance(value, Integral) and least <= int(value) < below


def is_number(value: Any) -> bool:
    """Whether a value is a real number that a float can hold, and not NaN, True or False."""
    if type(value) is bool or not isinstance(value, Real):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def _count(error: type[FxpruneError]) -> Check:
    return wanted(lambda n: is_whole(n, below=_COUNTS), "it is a whole number, at least 1 and below 2**31", error)


def _share(what: str) -> Check:
    return wanted(
        lambda x: is_number(x) and 0 < x <= 1,
        f"it is a share of the original's {what}: more than 0, at most 1",
        PlanError,
    )


def _positive(what: str) -> Check:
    return wanted(lambda x: is_number(x) and 0 < x < math.inf, what)


def _of_names(kinds: bool) -> Check:  # noqa: FBT001
    """The check for names, or where `kinds` may be given for module types too, one of them or several."""

    def fits(entry: Any) -> bool:
        return isinstance(entry, str) or (kinds and isinstance(entry, type) and issubclass(entry, nn.Module))

    types = ", or module types" if kinds else ""
    return wanted(
        lambda value: fits(value) or (_is_collection(value) and all(map(fits, value))),
        f"it is a name or glob pattern of names{types}, or a list of them",
    )


def _is_collection(value: Any) -> bool:
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))


def _function(what: str) -> Check:
    return wanted(callable, f"it is a function, {what}", CalibrationError)


def is_keywords(value: Any) -> bool:
    """Whether a value maps names to what they stand for."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


# -- loaders, models and devices ---------------------------------------------------------------------------------------


def check_batches(name: str, value: Any) -> None:
    """Raise where data are given in place of a loader."""
    check_loader(value, "the loader" if name == "loader" else name)


def check_model(name: str, value: Any) -> None:
    """Raise where something else is given in place of a model, with what makes one of it."""
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
    """Raise where something else is given in place of a module, or one that cannot be listed."""
    instance(nn.Module, "give a model, an nn.Module")(name, value)
    check_made(value)


def check_device(name: str, value: Any) -> None:
    """Raise where there is no such device, or nothing is computed there."""
    try:
        found = torch.empty(0, device=value).device
    except Exception as error:
        raise FxpruneError(
            f"{name} is {shown(value)}, which cannot be used ({first_line(error)}): name another"
        ) from error
    if found.type == "meta":
        raise FxpruneError(f"{name} is {shown(value)}, where nothing has numbers: name a device that computes")


# -- the table ---------------------------------------------------------------------------------------------------------

CHECKS |= {
    "alpha": wanted(
        lambda x: is_number(x) and 0 <= x <= 1, "it is a share of units and lies between 0 and 1", PlanError
    ),
    "params": _share("parameters"),
    "macs": _share("MACs"),
    "latency": _share("latency"),
    **dict.fromkeys(("min_keep", "round_to", "rounds"), _count(PlanError)),
    **dict.fromkeys(
        ("samples_per_class", "projections", "max_classes", "max_samples", "every"), _count(CalibrationError)
    ),
    **dict.fromkeys(("repeats", "epochs", "patience", "threads"), _count(FxpruneError)),
    "sample_memory": wanted(is_whole, "it is a whole number of bytes, at least 1", CalibrationError),
    "seed": wanted(lambda n: is_whole(n, 0, _SEEDS), "it is a whole number from 0 to 2**63 - 1"),
    "lr": _positive("the learning rate is a positive number"),
    "temperature": _positive("it divides logits, and is a positive number"),
    "distill": wanted(
        lambda x: is_number(x) and 0 < x <= 1, "it is the teacher's share in the loss, above 0 and at most 1"
    ),
    "tolerance": wanted(lambda x: is_number(x) and x >= 0, "it is a number, at least 0"),
    "seconds": wanted(lambda x: is_number(x) and x >= 0, "it is a number of seconds, at least 0"),
    "batch_sizes": wanted(
        lambda sizes: _is_collection(sizes) and len(sizes) > 0 and all(is_whole(n, below=_COUNTS) for n in sizes),
        "it is a list of whole numbers, at least 1 and below 2**31",
    ),
    **dict.fromkeys(
        ("inexact", "head_dim", "verify", "prove", "build", "progress", "note", "dynamic_batch", "resume"),
        wanted(lambda flag: isinstance(flag, (bool, np.bool_)), "it is True or False"),
    ),
    "unknown": chosen(("error", "freeze"), FxpruneError),
    "loss": _function("loss(output, targets)"),
    "unpack": _function("unpack(batch), which gives (inputs, targets)"),
    "classes": _function("classes(targets), which gives the class of each sample"),
    "run": _function("run(model, inputs, targets), which gives the mean loss of the batch"),
    "metric": _function("metric(output, targets)"),
    "logits": _function("logits(output)"),
    "optimizer": _function("optimizer(parameters), which gives a torch.optim.Optimizer"),
    **dict.fromkeys(("exclude", "leaves"), _of_names(kinds=True)),
    "ignore": _of_names(kinds=False),
    **dict.fromkeys(("loader", "train_loader", "val_loader"), check_batches),
    "model": check_model,
    "device": check_device,
    "submodule": wanted(lambda path: isinstance(path, str), "it is the path of a module, such as 'backbone.layer1'"),
    "concrete_args": wanted(is_keywords, "it is a dict of names of arguments and their values", CaptureError),
    "finetune": wanted(is_keywords, "it is a dict of arguments of fxprune.finetune"),
    "checkpoint": wanted(lambda path: isinstance(path, (str, PathLike)), "it is the path of a file", CalibrationError),
    **dict.fromkeys(
        ("small", "teacher", "weights"),
        check_module,
    ),
}
