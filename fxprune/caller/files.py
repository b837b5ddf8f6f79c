"""Files that are written whole or not at all, and checks of the paths of files and folders."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fxprune.caller.interrupts import DeferredInterrupts
from fxprune.errors import FxpruneError

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
}  # fmt: skip
_SHOWN = 200  # characters of a path in a message

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: str | PathLike[str], error: type[FxpruneError]) -> Iterator[Path]:
    """A new file to write, which replaces `path` in one step if the work succeeds.

    The file lies in a hidden folder beside `path`, which is always removed afterwards; folders that killed processes
    left are removed, too. The target of a link is replaced, not the link. The permissions of `path` are kept.

    Raises `error` where `writable` does, or where writing fails.
    """
    goal = writable(path, error)
    try:
        with DeferredInterrupts(), _folder(goal) as folder:
            unfinished = folder / goal.name
            unfinished.touch(exist_ok=False)
            mode = stat.S_IMODE((goal if goal.exists() else unfinished).stat().st_mode)
            yield unfinished
            unfinished.chmod(mode)  # some writers make files that only their owner can read
            to_disk(unfinished)
            unfinished.replace(goal)
            to_disk(goal.parent)
    except OSError as cause:
        raise error(f"{path} cannot be written ({cause}): is there room, and are you allowed to?") from cause


def writable(path: str | PathLike[str], error: type[FxpruneError]) -> Path:
    """The path, without links, of a regular file or a new one. Raises `error` where it cannot be one."""
    goal = Path(os.path.realpath(regular(path, error, "written")))
    if not goal.parent.is_dir():
        raise error(f"{path} cannot be written: there is no folder {Path(path).parent}; make it first")
    return goal


@contextmanager
def _folder(goal: Path) -> Iterator[Path]:
    """A new hidden folder beside a file, locked while in use; unlocked ones with files are abandoned and removed.

    Where the system cannot lock folders, none is removed, because another process may be writing there.
    """
    options: dict[str, Any] = {"prefix": f".{goal.name}.", "suffix": ".part", "dir": goal.parent}
    with TemporaryDirectory(**options, ignore_cleanup_errors=True) as name, _locked(Path(name)):
        for other in goal.parent.glob(f".{glob.escape(goal.name)}.{'[0-9a-z_]' * 8}.part"):
            with suppress(OSError), _locked(other) as free:
                if free and any(other.iterdir()):  # an empty one may be so new that it is not locked yet
                    shutil.rmtree(other)
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, until the process ends at the latest; gives whether this succeeded."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is written to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular(path: Any, error: type[FxpruneError], done: str) -> Path:
    """The path of a file that is to be "read" or "written", which may be missing; links are followed.

    Raises `error` where it is no path, or names anything but a regular file: a folder, device, pipe or socket.
    """
    return _of_kind(path, stat.S_IFREG, error, done)


def folder(path: Any, error: type[FxpruneError], done: str) -> Path:
    """The path of a folder that is to be "read" or "written"; raises `error` where it is no path, or names a file."""
    return _of_kind(path, stat.S_IFDIR, error, done)


def made_folder(path: Any, error: type[FxpruneError]) -> Path:
    """The path of a folder, which is made where it is missing. Raises `error` where that fails."""
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
    except (TypeError, ValueError) as cause:  # not text, or with characters that no name can have
        raise error(f"{shown(path)!r} cannot be {done} ({cause}): name it by a str or a pathlib.Path") from cause
    if kind != wanted:
        remedy = "a folder" if wanted == stat.S_IFDIR else "a file in it" if kind == stat.S_IFDIR else "a regular file"
        raise error(f"{shown(path)} cannot be {done}: it is {_KINDS.get(kind, 'something else')}; name {remedy}")
    return found


def shown(path: object) -> object:
    """A path for a message: the beginning of a very long one."""
    return path if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
