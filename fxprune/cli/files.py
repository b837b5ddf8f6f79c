"""The files that a command writes: checked before the work begins, and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from fxprune.caller.files import replacing, writable
from fxprune.errors import FxpruneError, either, visible


def check_writable(*paths: Path | None) -> None:
    """Raise FxpruneError where a file could not be written in the end: no folder for it, or no file."""
    for path in paths:
        if path is not None and not os.access(folder := writable(path, FxpruneError).parent, os.W_OK):
            raise FxpruneError(f"{path} cannot be written: {folder} is not yours to write into; name another")


def check_suffix(paths: Iterable[Path], suffixes: tuple[str, ...], option: str) -> None:
    """A usage error where a file does not end in one of `suffixes`."""
    for path in paths:
        if path.suffix not in suffixes:
            raise typer.BadParameter(visible(f"{path} has to end in {either(suffixes)}"), param_hint=option)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON in one step."""
    with replacing(path, FxpruneError) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
