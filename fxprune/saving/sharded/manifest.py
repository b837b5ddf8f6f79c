"""The manifest of a rewritten checkpoint, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike

from fxprune.caller.files import regular
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CheckpointError, plural, visible
from fxprune.planning.plan import Plan

FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor: its file, its dtype in the notation of safetensors, its shapes before and after."""

    file: str
    dtype: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a rewritten checkpoint.

    `model` is the class that the plan is for, `plan` the SHA-256 of the plan, see `digest_of_plan`. `left_out` lists
    the ignored tensors of the source; `aliases` maps names that are not in the files to the name of their tensor.
    """

    fxprune_checkpoint: int
    model: str
    plan: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorChange]
    left_out: tuple[str, ...]
    aliases: Mapping[str, str]

    def __repr__(self) -> str:
        changed = sum(tensor.before != tensor.after for tensor in self.tensors.values())
        size = sum(file.size for file in self.files.values())
        text = (
            f"checkpoint of {self.model}: {plural(len(self.tensors), 'tensor')}, {changed:,} of them narrowed, in "
            f"{plural(len(self.files), 'file')} of {size:,} bytes; plan {self.plan[:12]}"
        )
        return visible(text)

    def to_text(self) -> str:
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Manifest:
        """Read a manifest. Raises CheckpointError where the file is not one."""
        file = regular(path, CheckpointError, "read")
        try:
            return from_plain(cls, json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"{path} is not a manifest that rewrite_checkpoint wrote ({error})") from error


def digest_of_plan(plan: Plan) -> str:
    """The SHA-256 of a plan as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
