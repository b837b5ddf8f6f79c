"""The folder beside the target in which a checkpoint is made, and what an earlier run left there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxprune.caller.files import replacing, to_disk
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan
from fxprune.saving.sharded.manifest import FileRecord, Manifest, digest_of
from fxprune.saving.sharded.shards import Shard

PROGRESS = "progress.json"


@dataclass(slots=True)
class Staging:
    """A checkpoint in the making: its folder, what it is made of, and the files that are finished."""

    folder: Path
    plan_digest: str
    identity: Mapping[str, Any]
    done: dict[str, FileRecord] = field(default_factory=dict)

    def finished(self, name: str) -> FileRecord | None:
        """The record of a file that an earlier run finished, and that still is what it was then."""
        record, path = self.done.get(name), self.folder / name
        if record is None or not path.is_file() or path.stat().st_size != record.size:
            return None
        return record if _sha256(path) == record.sha256 else None

    def note(self, name: str, record: FileRecord) -> None:
        """Remember that a file is finished."""
        self.done[name] = record
        self.write()

    def write(self) -> None:
        """Write down what is made here, and what is finished."""
        content = {"of": self.identity, "done": {file: asdict(known) for file, known in self.done.items()}}
        with replacing(self.folder / PROGRESS, CheckpointError) as unfinished:
            unfinished.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def staged(
    target: Path, plan: Plan, shards: Sequence[Shard], left_out: Mapping[str, None], *, resume: bool
) -> Iterator[Staging]:
    """A folder to make a checkpoint in, which becomes `target` in one step when all went well, and else stays.

    Raises CheckpointError where the target exists, or what is there was made of something else.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists: name a folder that does not, or remove it")
    if not target.resolve().parent.is_dir():
        raise CheckpointError(f"{target} cannot be made: there is no folder {target.resolve().parent}; make it first")
    digest = digest_of(plan)
    sources = {shard.name: shard.identity for shard in shards}
    identity = {"plan": digest, "left_out": list(left_out), "sources": sources}
    folder = target.resolve().with_name(f".{target.name}.unfinished")
    try:
        if folder.exists() and not resume:
            _remove(folder)
        staging = Staging(folder, digest, identity, _earlier(folder, identity))
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


def _earlier(folder: Path, identity: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The files that an earlier run finished. Raises CheckpointError where it was one of something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    try:
        if not (folder / PROGRESS).exists():  # killed in its last step
            manifest = Manifest.load(folder / "manifest.json")
            return dict(manifest.files) if manifest.plan == identity["plan"] else {}
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if content["of"] == identity:
            return from_plain(dict[str, FileRecord], content["done"], "done")
    except (ValueError, TypeError, KeyError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{folder} is not what rewrite_checkpoint left ({error}): remove it") from error
    raise CheckpointError(
        f"{folder} is of an unfinished run with another plan, other ignored tensors or another source: "
        "resume=False deletes it and starts anew"
    )


def _remove(folder: Path) -> None:
    """Delete what an earlier run left. Raises CheckpointError where it is something else."""
    if any(folder.iterdir()) and not ((folder / PROGRESS).exists() or (folder / "manifest.json").exists()):
        raise CheckpointError(f"{folder} is not what rewrite_checkpoint left: remove it")
    shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
