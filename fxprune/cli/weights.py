"""Weights of a model from a file: safetensors, a checkpoint of torch.save, or an artefact of fxprune."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, product, takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fxprune.caller.files import regular
from fxprune.caller.source_lines import warn
from fxprune.cli.named_objects import did_you_mean
from fxprune.errors import FxpruneError, a_kind, summary
from fxprune.saving.artifact import load

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema", "model_ema", "params", "module")
AVERAGED = "n_averaged"  # the entry that torch's AveragedModel adds
SHOWN = 3
State = dict[str, Tensor]


def with_weights(model: nn.Module, path: Path, key: str | None = None) -> nn.Module:
    """`model` with the weights of a file; of an artefact, the smaller model that it makes of `model`.

    A state_dict may lie in dicts under names in `WRAPPERS`, or under the dotted `key`. A prefix that all its names
    share, or all names of the model, such as "module.", makes no difference.

    Raises FxpruneError where the file is none of these, or is of another model.
    """
    regular(path, FxpruneError, "read")
    if path.suffix == ".safetensors" and _is_artifact(path):
        return load(path, model)
    content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    states = _states(content, path, key)
    own = model.state_dict()
    found = {
        place: max(_renamed(state, own), key=lambda state: _fitting(state, own)) for place, state in states.items()
    }
    place = max(found, key=lambda place: _fitting(found[place], own))
    try:
        model.load_state_dict(found[place])
    except RuntimeError as error:
        where = f"{path}, under {place}," if place else str(path)
        raise FxpruneError(_misfit(model, found[place], where, error)) from error
    others = [name for name, state in found.items() if name != place and _fitting(state, own) == len(own)]
    if others:
        warn(f"{path} has weights under {place} and {' and '.join(others)}: took {place}; --weights-key names another")
    return model


def _is_artifact(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "fxprune_artifact" in (file.metadata() or {})
    except SafetensorError as error:
        raise FxpruneError(f"{path} is no safetensors file, or is cut off ({error}): get it anew") from error


def _unpickled(path: Path) -> Any:
    """The content of a file of torch.save: tensors, numbers and plain containers; nothing in it is run."""
    scalar, kinds = np.float64(0).__reduce__()[0], {type(np.dtype(kind)) for kind in "?bhilqfd"}
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, np.dtype, *kinds, *names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        said = (
            f"it needs the code of {needed[1]}, which may do anything" if needed else "it is cut off, or of other kind"
        )
        raise FxpruneError(
            f"{path} cannot be read as a state_dict ({said}): save model.state_dict() with torch.save or safetensors"
        ) from error


def _states(content: Any, path: Path, key: str | None) -> dict[str, State]:
    """The state_dicts in a file, by the dotted path at which they lie. Raises FxpruneError where there is none."""
    found = dict(_found(content if key is None else _at(content, key, path), key or ""))
    if found:
        return found
    if not isinstance(content, Mapping):
        raise FxpruneError(f"{path} holds {a_kind(content)} that is no state_dict: save model.state_dict()")
    if key is not None:
        raise FxpruneError(f"--weights-key {key} names no state_dict in {path}, which has {_contents(content)}")
    inside = [str(name) for name, entry in content.items() if isinstance(entry, Mapping)]
    like = f", --weights-key {inside[0]} say" if len(inside) == 1 else ""
    raise FxpruneError(
        f"{path} holds no state_dict under {', '.join(WRAPPERS)}: name its place with --weights-key{like}; it has "
        f"{_contents(content)}"
    )


def _found(content: Any, place: str) -> Iterator[tuple[str, State]]:
    """The state_dict that a mapping is, or those under its wrappers, to a depth of four."""
    if not isinstance(content, Mapping) or not content or place.count(".") > 3:
        return
    if all(isinstance(tensor, Tensor) for tensor in content.values()):
        yield place, {str(name): tensor for name, tensor in content.items() if name != AVERAGED}
    for name in WRAPPERS:
        yield from _found(content.get(name), f"{place}.{name}".lstrip("."))


def _at(content: Any, key: str, path: Path) -> Any:
    """The entry at a dotted key. Raises FxpruneError where there is none."""
    entries = content if isinstance(content, Mapping) else {}
    if key in entries:
        return entries[key]
    first, dot, rest = key.partition(".")
    if dot and first in entries:
        return _at(entries[first], rest, path)
    known = [str(name) for name in entries]
    raise FxpruneError(f"{path} has no {first} for --weights-key: it has {_some(known)}{did_you_mean(first, known)}")


def _contents(content: Mapping[Any, Any]) -> str:
    """The keys of a mapping; behind each that holds another mapping, how many entries that has."""
    sizes = {name: f" ({len(entry)} entries)" if isinstance(entry, Mapping) else "" for name, entry in content.items()}
    return _some([f"{name}{size}" for name, size in sizes.items()], shown=12)


def _renamed(state: State, own: Mapping[str, Tensor]) -> Iterator[State]:
    """The state_dict under the names that the model may use: as they are, and with one prefix removed or added."""
    for prefix, added in product(_prefixes(state), _prefixes(own)):
        yield {f"{added}{name.removeprefix(prefix)}": tensor for name, tensor in state.items()}


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """The dotted prefixes that all names share, the shortest first.

    >>> _prefixes({"module.net.0.weight": 0, "module.net.1.bias": 0})
    ['', 'module.', 'module.net.']
    """
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    return list(accumulate((f"{level[0]}." for level in shared), initial=""))


def _fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    """The number of entries that the model has, too, in the same shape."""
    return sum(name in own and own[name].shape == tensor.shape for name, tensor in state.items())


def _misfit(model: nn.Module, state: State, where: str, error: RuntimeError) -> str:
    """The message for a state_dict of another model."""
    own = model.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    found = {
        "lacks": [name for name in own if name not in state],
        "has besides": [name for name in state if name not in own],
        "has": shapes,
    }
    said = "; ".join(f"it {verb} {_some(names)}" for verb, names in found.items() if names) or summary(error)
    return (
        f"{where} is not of this {type(model).__name__}: {said}; {_fitting(state, own)} of its {len(state)} entries "
        "fit; build the model with the same --model-arg as in training, or name other weights with --weights-key"
    )


def _some(names: list[str], shown: int = SHOWN) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
