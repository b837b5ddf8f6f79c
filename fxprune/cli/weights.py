"""Weights of a model from a file: safetensors, a state_dict of torch.save, or an artefact of fxprune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fxprune.caller.files import regular
from fxprune.errors import FxpruneError, first_line
from fxprune.saving.artifact import load

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep a state_dict
SHOWN = 3


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """`model` with the weights of a file; of an artefact, the smaller model that it makes of `model`.

    Raises FxpruneError where the file is none of these, or is of another model.
    """
    regular(path, FxpruneError, "read")
    if path.suffix == ".safetensors" and _is_artifact(path):
        return load(path, model)
    state = _state_of(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FxpruneError(_misfit(model, state, path, error)) from error
    return model


def _is_artifact(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "fxprune_artifact" in (file.metadata() or {})
    except SafetensorError as error:
        raise FxpruneError(f"{path} is no safetensors file, or is cut off ({error}): get it anew") from error


def _state_of(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, without the wrappers of training scripts."""
    content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise FxpruneError(f"{path} holds a {type(content).__name__} that is no state_dict: save model.state_dict()")
    parallel = bool(content) and all(name.startswith("module.") for name in content)  # DataParallel puts it there
    return {name.removeprefix("module.") if parallel else name: tensor for name, tensor in content.items()}


def _unpickled(path: Path) -> Any:
    """The content of a file of torch.save: tensors and plain containers; nothing else is ever unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FxpruneError(
            f"{path} cannot be read as a state_dict ({first_line(error)}): save model.state_dict() with torch.save or "
            "safetensors"
        ) from error


def _misfit(model: nn.Module, state: Mapping[str, Tensor], path: Path, error: RuntimeError) -> str:
    """The message for a state_dict of another model."""
    own = model.state_dict()
    lacking, extra = [name for name in own if name not in state], [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    found = {"lacks": lacking, "has besides": extra, "has": shapes}
    said = "; ".join(f"it {verb} {_some(names)}" for verb, names in found.items() if names) or first_line(error)
    return f"{path} is not of this {type(model).__name__}: {said}; build it with the same --model-arg as in training"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
