"""Checkpoints of fine-tuning: one file, replaced after every epoch, from which it continues."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import torch

from fxprune.caller.files import regular, replacing
from fxprune.errors import FxpruneError, first_line
from fxprune.scoring.resuming import check_same_run

FORMAT = 1


def write(path: str | PathLike[str], settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step, see `replacing`: readers see the old file or the new one, never a part."""
    with replacing(path, FxpruneError) as unfinished:
        try:
            torch.save({"fxprune_finetune": FORMAT, "settings": dict(settings), "state": dict(state)}, unfinished)
        except RuntimeError as error:  # torch's error where the disk is full
            raise OSError(first_line(error)) from error


def read(path: str | PathLike[str], settings: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state in a checkpoint that was written with the same settings; None where there is no file.

    Raises FxpruneError where the file is no checkpoint, or belongs to another run.
    """
    file = regular(path, FxpruneError, "read")
    if not file.parent.is_dir():
        raise FxpruneError(f"checkpoint is {path}, but there is no folder {file.parent}: make it first")
    if not file.exists():
        return None
    try:
        content = torch.load(file, map_location=device, weights_only=True)
        made, state, form = content["settings"], dict(content["state"]), content["fxprune_finetune"]
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, ValueError, OSError) as error:
        raise FxpruneError(
            f"{path} is not a checkpoint that finetune wrote ({type(error).__name__}): remove it, or name another file"
        ) from error
    check_same_run(path, FxpruneError, (form, FORMAT), (made, settings), "name another file")
    return state
