"""Checkpoints of fine-tuning: one file, replaced after every epoch, that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import torch

from fxprune.caller.files import regular, replacing
from fxprune.errors import FxpruneError, first_line

FORMAT = 1


def write(path: str | PathLike[str], settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step, see `replacing`: whoever reads sees the old file or the new one, never a part."""
    with replacing(path, FxpruneError) as unfinished:
        try:
            torch.save({"fxprune_finetune": FORMAT, "settings": dict(settings), "state": dict(state)}, unfinished)
        except RuntimeError as error:  # which torch makes of a full disk
            raise OSError(first_line(error)) from error


def read(path: str | PathLike[str], settings: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state in a checkpoint that was written with the same settings; None where there is no file.

    Raises FxpruneError where the file is no checkpoint, or is one of another run.
    """
    file = regular(path, FxpruneError, "read")
    if not file.parent.is_dir():
        raise FxpruneError(f"checkpoint is {path}, but there is no folder {file.parent}: make it first")
    if not file.exists():
        return None
    try:
        content = torch.load(file, map_location=device, weights_only=True)
        made, state, made_by = content["settings"], dict(content["state"]), content["fxprune_finetune"]
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, ValueError, OSError) as error:
        raise FxpruneError(
            f"{path} is not a checkpoint that finetune wrote ({type(error).__name__}): remove it, or name another file"
        ) from error
    if made_by != FORMAT:
        raise FxpruneError(f"{path} has checkpoint format {made_by}, this fxprune reads {FORMAT}: update it")
    for name, value in settings.items():
        if made.get(name) != value:
            raise FxpruneError(
                f"{path} was written with {name}={made.get(name)!r}, and now it is {value!r}: go on with the same "
                "model and options, or name another file"
            )
    return state
