"""What `compress_folder` did, block by block, as a record and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fxprune.caller.files import replacing
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan

BLOCKS = "blocks.json"


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block: the error of its proof, and how far its output is from the original's on the samples held out.

    `before` is that of the plain removal, `after` that of the refitted block, both behind the pruned blocks before it:
    squared errors in shares of the square of the hidden states. They are None where no samples could be held out.
    """

    path: str
    proof: float
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, slots=True)
class FolderReport:
    """The plan of the whole model, the fields of the configuration that changed, and the records of the blocks."""

    plan: Plan
    config: Mapping[str, tuple[object, object]]
    blocks: Sequence[BlockRecord]

    def __str__(self) -> str:
        changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.config.items())
        lines = [str(self.plan).partition("\n")[0], f"  {changed}"]
        for block in self.blocks:
            errors = "" if block.after is None else f", error {block.before:.3g} -> {block.after:.3g} by the refit"
            lines.append(f"  {block.path}: proof {block.proof:.1g}{errors}")
        return "\n".join(lines)


def read_blocks(folder: Path) -> dict[str, BlockRecord]:
    """The records in a folder, by the paths of the blocks; none where it has none yet."""
    path = folder / BLOCKS
    if not path.exists():
        return {}
    try:
        found = from_plain(tuple[BlockRecord, ...], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no file of compress_folder ({error}): resume=False starts anew") from error
    return {block.path: block for block in found}


def write_blocks(blocks: Mapping[str, BlockRecord], path: Path) -> None:
    """Write the records of the blocks, in one step."""
    with replacing(path, CheckpointError) as unfinished:
        unfinished.write_text(json.dumps([asdict(block) for block in blocks.values()], indent=1) + "\n", "utf-8")
