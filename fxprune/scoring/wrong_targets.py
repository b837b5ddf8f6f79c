"""What is wrong with the output and the targets where a loss fails, and the loss= that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.caller.example import is_dense
from fxprune.caller.model_checks import if_of_transformers
from fxprune.caller.tensors import dtype_name
from fxprune.errors import CalibrationError, a, a_kind, error_text, is_out_of_memory

_FITTING = (torch.int64, torch.uint8)  # the dtypes of class numbers that cross-entropy takes
_SHOWN = 3  # tensors of an output in a message
_SUMS = 0.01  # how far the sum of the probabilities of a sample may be from 1


class Misfit(NamedTuple):
    """What is wrong with targets, and the expressions in `out` and `y` for which a loss takes them; or a remedy."""

    what: str
    y: str = "y"
    out: str = "{}"  # in place of {}: the part of the output that holds the logits
    loss: str = "F.cross_entropy"
    remedy: str = ""

    def mended(self, part: str) -> str:
        """The remedy, where `part` is the expression of the logits in the output."""
        return self.remedy or f"pass loss=lambda out, y: {self.loss}({self.out.format(part)}, {self.y})"


def check_classes(loss: Any, output: Any, targets: Any, where: str) -> None:
    """Raise CalibrationError where torch's cross-entropy is not defined, but gives a number or ends the process.

    It gives a number for an output of one number a sample, and for targets that are taken for probabilities but are
    none. A class that the output does not have ends the process on an accelerator.
    """
    if not compares_classes(loss) or not is_dense(output) or not is_dense(targets):
        return
    found = _one_number(output, targets) or _no_probabilities(output, targets)
    if found is None and not output.is_cpu and output.ndim > 1:
        found = _out_of_range(output, targets, loss)
    if found is not None:
        raise CalibrationError(f"the targets of {where} {found.what}: {found.mended('out')}")


def only_ignored(loss: Any, targets: Any) -> str:
    """The reason why cross-entropy is not a number, where it ignores all targets; else empty."""
    ignored = getattr(loss, "ignore_index", -100)
    if not compares_classes(loss) or not is_dense(targets) or not bool((targets == ignored).all()):
        return ""
    return f"all its targets are {ignored}, which cross-entropy ignores: leave such batches out"


def failure(name: str, loss: Any, output: Any, targets: Any, where: str, error: Exception) -> str:
    """The message for a loss that failed on a batch: what is wrong with it, where that is known, and the remedy."""
    fails = f"the loss {name} fails on {where} ({error_text(error)})"
    if is_out_of_memory(error):
        return fails
    if targets is None:
        return (
            f"{where} has no targets, and the loss {name} fails without ({error_text(error)}): give batches (inputs, "
            'targets), or say what the two are, such as unpack=lambda batch: (batch["image"], batch["label"])'
        )
    own = if_of_transformers(output)
    what, remedy = _misfit_of_classes(output, targets, loss) if compares_classes(loss) else ("", "")
    if what:
        return f"on {where}, {what}, and the loss {name} fails ({error_text(error)}): {remedy}{own}"
    given = f"the output is {_shown(output)}, and the targets are {_shown(targets)}"
    return f"{fails}; {given}: pass loss=, a callable(output, target) that takes these{own}"


def compares_classes(loss: Any) -> bool:
    """Whether a loss is torch's cross-entropy."""
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def _misfit_of_classes(output: Any, targets: Any, loss: Any) -> tuple[str, str]:
    """What is wrong where cross-entropy fails, and the remedy, by the part of the output that fits best."""
    parts = sorted(_parts("out", output), key=lambda part: "logits" not in part[0])
    found = [
        (path, _misfit(logits, targets, loss))
        for path, logits in parts
        if logits.is_floating_point() and logits.ndim > 1
    ]
    path, misfit = min(found, key=lambda part: part[1] is not None, default=("out", None))
    if misfit is not None:
        return f"the targets {misfit.what}", misfit.mended(path)
    return ("", "") if path == "out" else (f"the output is {_shown(output)}", Misfit("").mended(path))


def _misfit(logits: Tensor, targets: Any, loss: Any) -> Misfit | None:
    """What is wrong with targets; None where nothing is known to be."""
    if not isinstance(targets, Tensor):
        return _no_tensor(logits, targets, loss)
    return next((found for check in _CHECKS if (found := check(logits, targets, loss))), None)


def _parts(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output, each with the expression that takes it from there."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _parts(f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]", part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _parts(f"{path}.{field.name}", getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _parts(f"{path}[{index}]", part)


def _shown(value: Any) -> str:
    """The type of a value, with the shapes of its tensors."""
    if isinstance(value, Tensor):
        return f"{a(dtype_name(value))} tensor of shape {tuple(value.shape)}"
    parts = [f"{path} of shape {tuple(part.shape)}" for path, part in _parts("", value)]
    more = ", ..." * (len(parts) > _SHOWN)
    return a_kind(value) + (f" with {', '.join(parts[:_SHOWN])}{more}" if parts else "")


# -- what may be wrong: each check is given the logits, the targets and the loss ------------------------------------


def _one_number(out: Tensor, y: Tensor) -> Misfit | None:
    """Targets of a model that gives one number a sample: of two classes, or of a regression."""
    if not out.ndim or not y.ndim or len(out) != len(y) or (out.ndim > 1 and out.shape[1] != 1):
        return None
    binary = bool(((y == 0) | (y == 1)).all())
    what = f"meet an output of one number a sample, of shape {tuple(out.shape)}, and cross-entropy compares classes"
    loss = "F.binary_cross_entropy_with_logits" if binary else "F.mse_loss"
    more, less = out.ndim > y.ndim, out.ndim < y.ndim
    return Misfit(what, f"y{'.squeeze(1)' * less}.float()", "{}" + ".squeeze(1)" * more, loss)


def _no_probabilities(out: Tensor, y: Tensor) -> Misfit | None:
    """Numbers of the form of the output that are no probabilities of classes."""
    if not y.is_floating_point() or y.shape != out.shape or out.ndim < 2 or y.is_complex():
        return None
    sums = y.sum(1)
    if float(y.amin()) >= 0 and bool(((sums - 1).abs() < _SUMS).all()):
        return None
    if bool(((y == 0) | (y == 1)).all()):
        return Misfit("name several classes a sample", "y", loss="F.binary_cross_entropy_with_logits")
    return Misfit("have the shape of the output and are no probabilities of classes", "y", loss="F.mse_loss")


def _no_tensor(out: Tensor, y: Any, loss: Any) -> Misfit | None:
    """Targets in a dict, a list or an array."""
    if isinstance(y, Mapping):
        fitting = (path for path, part in _parts("y", y) if part.ndim and len(part) == len(out))
        return next((Misfit(f"are {_shown(y)}", path) for path in fitting), None)
    if isinstance(y, (tuple, list)) and all(isinstance(entry, str) for entry in y):
        return Misfit("are names of classes", remedy="give their numbers, from 0, by unpack=")
    try:
        numbers = torch.as_tensor(np.asarray(y))
    except (TypeError, ValueError):
        return None
    inner = _misfit(out, numbers, loss) or Misfit("")
    what = f"are of type {type(y).__name__}, not a tensor"
    return inner._replace(what=what, y=f"torch.as_tensor(y, device=out.device){inner.y.removeprefix('y')}")


def _column(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """Class numbers with an axis of one entry for the classes."""
    if y.ndim != out.ndim or y.shape[1] != 1:
        return None
    if y.is_floating_point() and not torch.equal(y, y.round()):
        what = f"are fractions of shape {tuple(y.shape)}, and the output has {out.shape[1]} numbers a sample"
        return Misfit(what, remedy="pass loss=, a callable(output, target) such as F.mse_loss for a regression")
    cast = "" if y.dtype in _FITTING else ".long()"
    return Misfit(
        f"have shape {tuple(y.shape)}, and cross-entropy takes {tuple(y.squeeze(1).shape)}", f"y.squeeze(1){cast}"
    )


def _one_hot(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """Rows of zeros and ones for the classes, in place of their numbers."""
    if y.shape != out.shape or y.is_floating_point():
        return None
    whole = f"of shape {tuple(y.shape)} and dtype {dtype_name(y)}"
    if bool((y.sum(1) == 1).all()):
        return Misfit(f"are one-hot, {whole}", f"y{'.long()' * (y.dtype is torch.bool)}.argmax(1)")
    return Misfit(f"name several classes a sample, {whole}", "y.float()", loss="F.binary_cross_entropy_with_logits")


def _classes_last(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """An output whose last axis is that of the classes, as that of a language model."""
    if y.shape != out.shape[:-1] or out.ndim < 3:
        return None
    what = f"have shape {tuple(y.shape)}, and the output has its classes last, {tuple(out.shape)}"
    return Misfit(what, "y" if y.dtype in _FITTING else "y.long()", "{}.movedim(-1, 1)")


def _flat(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """An output that has the positions of all samples as its rows."""
    if out.ndim != 2 or y.ndim < 2 or y.numel() != len(out):
        return None
    return Misfit(f"have shape {tuple(y.shape)}, and the output has as many rows", "y.flatten()")


def _other_size(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """Maps of another size than the output's."""
    if y.ndim != 3 or out.ndim != 4 or len(y) != len(out) or y.shape[1:] == out.shape[2:]:
        return None
    what = f"are maps of {tuple(y.shape[1:])}, and the output's are {tuple(out.shape[2:])}"
    return Misfit(what, "y", "F.interpolate({}, y.shape[1:])")


def _other_count(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    if y.ndim and len(y) == len(out):
        return None
    what = f"have shape {tuple(y.shape)}, and the output has {len(out)} rows"
    return Misfit(what, remedy="give one target for each sample, by the loader or unpack=")


def _other_dtype(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """Class numbers, or other numbers, that are not whole numbers of 64 bits."""
    if y.dtype in _FITTING or y.shape != (len(out), *out.shape[2:]):
        return None
    if y.is_floating_point() and not torch.equal(y, y.round()):
        what = f"are fractions, and the output has {out.shape[1]} numbers a sample"
        return Misfit(what, remedy="pass loss=, a callable(output, target) such as F.mse_loss for a regression")
    return Misfit(f"are class numbers of dtype {dtype_name(y)}", "y.long()")


def _out_of_range(out: Tensor, y: Tensor, loss: Any) -> Misfit | None:
    """Class numbers for which the output has no number."""
    count, known = out.shape[1], y[y != getattr(loss, "ignore_index", -100)]
    if y.is_floating_point() or y.shape != (len(out), *out.shape[2:]) or not len(known):
        return None
    least, most = int(known.min()), int(known.max())
    if least >= 0 and most < count:
        return None
    if most < 0:
        return Misfit(f"are all negative, {least} the lowest", remedy="give class numbers from 0, or no such batch")
    what = f"hold class {most if most >= count else least}, and the output has {count} classes, 0 to {count - 1}"
    if least >= 1 and most == count:
        return Misfit(f"{what}; they count from 1", "y - 1")
    if most < count:
        return Misfit(
            what,
            f"y, ignore_index={least}"
            if bool((known[known < 0] == least).all())
            else "y.clamp(min=-1), ignore_index=-1",
        )
    return Misfit(what, remedy="give the labels that the model was trained with, or exchange them in unpack=")


Check = Callable[[Tensor, Tensor, Any], Misfit | None]
_CHECKS: tuple[Check, ...] = (
    _column, _one_hot, _classes_last, _flat, _other_size, _other_count, _other_dtype, _out_of_range,
)  # fmt: skip
