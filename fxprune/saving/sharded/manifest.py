"""What a rewritten checkpoint says of itself, as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike

from fxprune.caller.files import regular
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan

FORMAT = 1
DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}  # fmt: skip - the bytes of an entry


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor: the file that it is in, its dtype as safetensors calls it, its shapes before and after."""

    file: str
    dtype: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in the new file."""
        return math.prod(self.after) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A rewritten checkpoint.

    `model` is the class that the plan is for, `plan` the SHA-256 of the plan (see `digest_of`). `left_out` are tensors
    of the source that the caller ignored; `aliases` names that are not in the files since they are other names of one
    that is.
    """

    fxprune_checkpoint: int
    model: str
    plan: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorChange]
    left_out: tuple[str, ...]
    aliases: Mapping[str, str]

    def to_text(self) -> str:
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Manifest:
        """Read a manifest. Raises CheckpointError where the file is not one."""
        file = regular(path, CheckpointError, "read")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return from_plain(cls, content)
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"{path} is not a manifest that rewrite_checkpoint wrote ({error})") from error


def digest_of(plan: Plan) -> str:
    """The SHA-256 of a plan as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
