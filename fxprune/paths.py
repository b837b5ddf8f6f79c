"""The paths of files and folders, looked at before anything is read or written there."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
}  # fmt: skip
_SHOWN = 200  # characters of a path in a message


def regular(path: Any, error: type[FxpruneError], done: str) -> Path:
    """The path of a file that is to be "read" or "written"; of a link, what it leads to counts.

    Raises `error` where it is no path, or something else than a regular file is there: a folder, device, pipe, socket.
    """
    return _of_kind(path, stat.S_IFREG, error, done)


def folder(path: Any, error: type[FxpruneError], done: str) -> Path:
    """The path of a folder that is to be "read" or "written"; raises `error` where it is none, or a file is there."""
    return _of_kind(path, stat.S_IFDIR, error, done)


def made_folder(path: Any, error: type[FxpruneError]) -> Path:
    """The path of a folder, which is made where it is missing. Raises `error` where that cannot be."""
    found = folder(path, error, "written")
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise error(f"the folder {found} cannot be made ({cause}): name another") from cause
    return found


def _of_kind(path: Any, wanted: int, error: type[FxpruneError], done: str) -> Path:
    try:
        found = Path(path)
        kind = stat.S_IFMT(found.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as cause:
        raise error(f"{shown(path)} cannot be {done} ({cause.strerror})") from cause
    except (TypeError, ValueError) as cause:  # of what is no text, and of what no system has in a name
        raise error(f"{shown(path)!r} cannot be {done} ({cause}): name it by a str or a pathlib.Path") from cause
    if kind != wanted:
        remedy = "a folder" if wanted == stat.S_IFDIR else "a file in it" if kind == stat.S_IFDIR else "a regular file"
        raise error(f"{shown(path)} cannot be {done}: it is {_KINDS.get(kind, 'something else')}; name {remedy}")
    return found


def shown(path: object) -> object:
    """A path as messages name it: one that is very long by its beginning."""
    return path if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
