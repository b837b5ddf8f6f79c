"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from fxprune.errors import FxpruneError


@contextmanager
def replacing(path: str | PathLike[str], error: type[FxpruneError]) -> Iterator[Path]:
    """The name of a file to write, which takes the place of `path` in one step when all went well.

    It lies in the same folder, has the same suffix, and is gone afterwards whatever happened, an interrupt too. Where
    `path` is a link, what it points at is replaced. Who may read it stays as it was, or is as for any new file.

    Raises `error` where there is no such folder, or `path` is a folder itself.
    """
    goal = Path(os.path.realpath(path))
    if not goal.parent.is_dir():
        raise error(f"{path} cannot be written: there is no folder {goal.parent}; make it first")
    if goal.is_dir():
        raise error(f"{path} cannot be written: it is a folder; name a file in it")
    unfinished = goal.with_name(f".{goal.stem}.{uuid.uuid4().hex[:12]}.part{goal.suffix}")
    try:
        unfinished.touch(exist_ok=False)
        mode = stat.S_IMODE((goal if goal.exists() else unfinished).stat().st_mode)
        yield unfinished
        unfinished.chmod(mode)  # some writers make files that only their owner can read
        to_disk(unfinished)
        unfinished.replace(goal)
        to_disk(goal.parent)
    except OSError as cause:
        raise error(f"{path} cannot be written ({cause}): is there room, and are you allowed to?") from cause
    finally:
        unfinished.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
