"""The folder beside the target in which a checkpoint is made, and the files of an earlier run in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxprune.caller.files import replacing, to_disk
from fxprune.caller.ranks import rank_and_size, together
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CheckpointError
from fxprune.saving.sharded.manifest import FileRecord

PROGRESS = "progress.json"
Complete = Callable[[Path], dict[str, FileRecord]]


@dataclass(slots=True)
class Staging:
    """An unfinished checkpoint: its folder, what it is made of, and the finished files.

    Of several ranks that make it together, one `writes`.
    """

    folder: Path
    identity: Mapping[str, Any]
    done: dict[str, FileRecord] = field(default_factory=dict)
    writes: bool = True

    def finished(self, name: str) -> FileRecord | None:
        """The record of a file that an earlier run finished and that has not changed since."""
        record, path = self.done.get(name), self.folder / name
        return record if record and path.is_file() and _record(path) == record else None

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Have one rank write a file; all others wait for it."""
        with together(f"writing {name}"):
            if self.writes:
                write(self.folder / name)

    def finish(self, name: str) -> FileRecord:
        """Record that a file is finished."""
        self.done[name] = _record(self.folder / name)
        if self.writes:
            self.write()
        return self.done[name]

    def write(self) -> None:
        """Write what the checkpoint is made of, and the finished files."""
        content = {"of": self.identity, "done": {file: asdict(known) for file, known in self.done.items()}}
        with replacing(self.folder / PROGRESS, CheckpointError) as unfinished:
            unfinished.write_text(json.dumps(content), encoding="utf-8")


def _record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return FileRecord(digest.hexdigest(), path.stat().st_size)


@contextmanager
def staged(
    target: Path, identity: Mapping[str, Any], *, by: str, of: str, resume: bool, complete: Complete | None = None
) -> Iterator[Staging]:
    """A folder to make a checkpoint in, renamed to `target` at the end; after an error it is kept for the next run.

    `identity` is what the checkpoint is made of, in JSON. Messages name the function that makes it, `by`, and what an
    earlier run may have had other ones `of`. `complete` gives the finished files of a folder whose run was killed
    before the renaming alone.

    Raises CheckpointError where the target exists, or the folder is of other arguments.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists: name a folder that does not, or remove it")
    if not target.resolve().parent.is_dir():
        raise CheckpointError(f"{target} cannot be made: there is no folder {target.resolve().parent}; make it first")
    folder = _unfinished(target)
    try:
        if folder.exists() and not resume:
            _remove(folder, by)
        staging = Staging(folder, identity, _earlier(folder, identity, by, of, complete))
        folder.mkdir(exist_ok=True)
        for unfinished in (*folder.glob(".*.part"), *folder.glob(".*.young")):  # of a run that was killed
            shutil.rmtree(unfinished)
        staging.write()
        yield staging
        (folder / PROGRESS).unlink()
        folder.replace(target)
        to_disk(target.resolve().parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error}): is there room, and are you allowed to?"
        ) from error


@contextmanager
def staged_together(target: Path, identity: Mapping[str, Any], *, by: str, of: str, resume: bool) -> Iterator[Staging]:
    """`staged` for all ranks, of which the first one writes."""
    rank, _ = rank_and_size()
    with ExitStack() as stack:
        with together(f"making {target}"):
            if not rank:
                staging = stack.enter_context(staged(target, identity, by=by, of=of, resume=resume))
        if rank:
            folder = _unfinished(target)
            staging = Staging(folder, identity, _earlier(folder, identity, by, of, None), writes=False)
        yield staging
        with together(f"finishing {target}"):
            stack.close()


def _unfinished(target: Path) -> Path:
    """The folder in which a checkpoint is made."""
    return target.resolve().with_name(f".{target.name}.unfinished")


def _earlier(
    folder: Path, identity: Mapping[str, Any], by: str, of: str, complete: Complete | None
) -> dict[str, FileRecord]:
    """The files that an earlier run finished. Raises CheckpointError where it had other arguments."""
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    try:
        if complete is not None and not (folder / PROGRESS).exists():  # killed in its last step
            return complete(folder)
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if content["of"] == identity:
            return from_plain(dict[str, FileRecord], content["done"], "done")
    except (OSError, ValueError, TypeError, KeyError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{folder} is no unfinished run of {by} ({error}): remove it") from error
    raise CheckpointError(f"{folder} is of an unfinished run with {of}: resume=False deletes it and starts anew")


def _remove(folder: Path, by: str) -> None:
    """Delete the folder of an earlier run. Raises CheckpointError where it is another."""
    if any(folder.iterdir()) and not ((folder / PROGRESS).exists() or (folder / "manifest.json").exists()):
        raise CheckpointError(f"{folder} is no unfinished run of {by}: remove it")
    shutil.rmtree(folder)
