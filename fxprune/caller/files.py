"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
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
    """The name of a file to write, which takes the place of `path` in one step when all went well.

    It lies in a hidden folder beside `path`, which is gone afterwards whatever happened, an interrupt too; what killed
    processes left of theirs is removed on the way. Where `path` is a link, what it points at is replaced. Who may read
    it stays as it was, or is as for any new file.

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
    """A new hidden folder beside a file, held while it is needed; those of that file that nobody holds are removed.

    Where the system has no locks on folders, none is removed: another process may be writing there.
    """
    folder = goal.with_name(f".{goal.name}.{uuid.uuid4().hex[:12]}.part")
    young = folder.with_suffix(".young")  # until it is held, since it would look abandoned
    try:
        young.mkdir()
        with _held(young):
            young.rename(folder)
            for other in goal.parent.glob(f".{glob.escape(goal.name)}.{'[0-9a-f]' * 12}.part"):
                with suppress(OSError), _held(other) as free:
                    if free:
                        shutil.rmtree(other)
            yield folder
    finally:
        for made in (young, folder):
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder, until the process ends at the latest; gives whether that is possible, and nobody else does."""
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
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
