"""Where a smaller model came from: the call, its data, the date, and the versions that were used."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from numbers import Number
from typing import Any

import torch
from torch.utils.data import Subset

from fxprune.caller.arguments import shown
from fxprune.caller.batches import length_of
from fxprune.version import __version__

_PLAIN = (str, bytes, Number, type, type(None))


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a smaller model was made.

    `call` is the call of fxprune with the arguments that were given, or the command. `date` is the time in UTC (ISO
    8601) at which the model was made; two reports that differ in it alone are equal. `versions` are those of fxprune,
    torch and Python. `data` names the class of the calibration data, and `data_size` is its number of samples, where
    they are known. Units were scored with `samples` of them, by `seed`. `model`, `weights` and `file` are the names on
    the command line: of the model, of the file of its weights, and of the file that was written.
    """

    call: str
    date: str = field(compare=False)
    versions: Mapping[str, str]
    data: str | None = None
    data_size: int | None = None
    samples: int | None = None
    seed: int | None = None
    model: str | None = None
    weights: str | None = None
    file: str | None = None


def provenance_of(call: str, loader: Any, scores: Mapping[str, Any] | None) -> Provenance:
    """The provenance of a model that a call made just now, with this loader and, where they are known, these scores.

    `scores` says how they were made, see `Scores.about`.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = {"fxprune": __version__, "torch": str(torch.__version__), "Python": platform.python_version()}
    about = {name: (scores or {}).get(name) for name in ("samples", "seed")}
    return Provenance(call, now, versions, *data_of(loader), **about)


def data_of(loader: Any) -> tuple[str | None, int | None]:
    """The class of a loader's data, and the number of its samples.

    >>> data_of(torch.utils.data.DataLoader(Subset([1, 2, 3], [0, 2]))), data_of([1, 2]), data_of(None)
    (('Subset of list', 2), ('list', None), (None, None))
    """
    if loader is None:
        return None, None
    data = getattr(loader, "__dict__", {}).get("dataset", loader)  # no property of the caller's runs
    size, names = None if data is loader else length_of(data), list[str]()
    while isinstance(data, Subset):
        names, data = [*names, type(data).__name__], data.dataset
    return " of ".join([*names, type(data).__name__]), size


def call_of(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """A call of a public function, with all arguments that have no default, and the others that differ from theirs.

    >>> def plan(scores, alpha=None, *, min_keep=1, loss=None, **more): ...
    >>> call_of(plan, {"scores": object(), "alpha": 0.1, "min_keep": 1, "loss": abs, "more": {"every": 5}})
    'plan(scores, alpha=0.1, loss=abs, every=5)'
    """
    said = list[str]()
    for name, parameter in inspect.signature(function).parameters.items():
        value, default = given[name], parameter.default
        if parameter.kind is parameter.VAR_KEYWORD:
            said += [f"{key}={_shown(entry)}" for key, entry in value.items()]
        elif default is parameter.empty:
            said.append(name)
        elif (text := _shown(value)) != _shown(default):
            said.append(f"{name}={text}")
    return f"{function.__name__}({', '.join(said)})"


def _shown(value: Any) -> str:
    """An argument as code: plain values as they are, functions and classes by name, and "..." for all else."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, torch.device):
        return repr(str(value))
    name = getattr(value, "__name__", None) if callable(value) else None
    if isinstance(name, str):
        return name
    entries = value if isinstance(value, (list, tuple)) else [value]
    return shown(value) if all(isinstance(entry, _PLAIN) for entry in entries) else "..."
