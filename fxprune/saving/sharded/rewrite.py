"""Narrowing a checkpoint in shards by a plan, tensor by tensor, for models larger than memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.files import folder, replacing
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan
from fxprune.saving.sharded.manifest import FORMAT, FileRecord, Manifest, TensorChange
from fxprune.saving.sharded.narrowing import Narrowing, narrowing_of
from fxprune.saving.sharded.shards import Shard, Stored, shards_of, write_shard
from fxprune.saving.sharded.staging import Staging, staged

__all__ = ["Manifest", "rewrite_checkpoint"]


def rewrite_checkpoint(
    source_dir: str | PathLike[str],
    plan: Plan,
    target_dir: str | PathLike[str],
    *,
    model: nn.Module,
    ignore: Sequence[str] = (),
    resume: bool = True,
) -> Manifest:
    """Narrow the weights in a folder of safetensors files by a plan, without ever holding more than a part of one.

    The result holds the tensors that `apply` gives, bit by bit, in files of the same names, with an index, the plan
    and a manifest. It appears whole, when all is done. What an interrupted run finished is kept beside it, in
    `.NAME.unfinished`, and the next run of the same arguments goes on from there to the same bytes.

    Args:
        source_dir: a folder with `*.safetensors.index.json` and its shards, or with one safetensors file.
        plan: from `Scores.plan`.
        target_dir: the folder to make.
        model: of the architecture that the plan is for; its numbers are not looked at, it may be on the meta device.
        ignore: glob patterns of names of tensors in the files that the model does not have, and that are left out.
        resume: False starts anew, and deletes what an earlier run left.

    Returns:
        The manifest, as it is written: the files with their SHA-256, and each tensor's shapes before and after.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; a file cannot be read or written; the
            target exists.
        PlanError: the plan does not fit the model.
    """
    check(rewrite_checkpoint, locals())
    source, target = folder(source_dir, CheckpointError, "read"), folder(target_dir, CheckpointError, "written")
    shards = shards_of(source)
    narrowing = narrowing_of(model, plan)
    left_out = _checked(shards, narrowing, ignore, type(model).__name__)
    with staged(target, plan, shards, left_out, resume=resume) as staging:
        done = {shard.name: _rewritten(shard, narrowing, staging, left_out) for shard in shards}
        files = {name: record for name, record in done.items() if record is not None}
        tensors = {
            stored.name: _change(stored, shard, narrowing)
            for shard in shards for stored in shard.tensors.values() if stored.name not in left_out
        }  # fmt: skip
        manifest = Manifest(
            FORMAT, type(model).__name__, staging.plan_digest, files, tensors, tuple(left_out),
            _other_names(narrowing, tensors),
        )  # fmt: skip
        _write_notes(staging.folder, plan, manifest, shards)
    return manifest


def _other_names(narrowing: Narrowing, tensors: Collection[str]) -> dict[str, str]:
    """For every name that the files do not hold, the one under which they hold its tensor."""
    held = {narrowing.aliases.get(name, name): name for name in reversed([*tensors])}
    return {name: held[narrowing.aliases.get(name, name)] for name in narrowing.shapes if name not in tensors}


def _checked(shards: Sequence[Shard], narrowing: Narrowing, ignore: Sequence[str], model: str) -> dict[str, None]:
    """The tensors to leave out. Raises where those of the files are not those of the model."""
    held = {name: (shard, stored) for shard in shards for name, stored in shard.tensors.items()}
    left_out: dict[str, None] = {}
    for name, (shard, stored) in held.items():
        if name in narrowing.shapes:
            _check_shape(name, stored, shard, narrowing, model)
        elif any(fnmatchcase(name, pattern) for pattern in ignore):
            left_out[name] = None
        else:
            raise CheckpointError(
                f"{shard.path} holds {name} {stored.shape}, which {model} does not have: pass model= of the class "
                f"that was saved, or ignore=[{name!r}] to leave it out"
            )
    known = {narrowing.aliases.get(name, name) for name in held}
    missing = [name for name in narrowing.shapes if narrowing.aliases.get(name, name) not in known]
    if missing:
        raise CheckpointError(
            f"{shards[0].path.parent} lacks {missing[0]} {narrowing.shapes[missing[0]]}, which {model} has "
            f"({len(missing)} of {len(narrowing.shapes)} tensors are missing): pass model= of the class that was saved"
        )
    return left_out


def _check_shape(name: str, stored: Stored, shard: Shard, narrowing: Narrowing, model: str) -> None:
    if stored.shape != narrowing.shapes[name]:
        raise CheckpointError(
            f"{name} is {stored.shape} in {shard.path}, and {narrowing.shapes[name]} in the {model} that was given: "
            "build it with the arguments that the saved model had"
        )


def _rewritten(shard: Shard, narrowing: Narrowing, staging: Staging, left_out: Mapping[str, None]) -> FileRecord | None:
    """The record of a shard that is narrowed, now or in an earlier run; None where nothing of it stays."""
    tensors = [stored for stored in shard.tensors.values() if stored.name not in left_out]
    if not tensors:
        return None
    if (known := staging.finished(shard.name)) is None:
        with replacing(staging.folder / shard.name, CheckpointError) as unfinished:
            known = write_shard(shard, tensors, narrowing.kept, unfinished)
        staging.note(shard.name, known)
    return known


def _change(stored: Stored, shard: Shard, narrowing: Narrowing) -> TensorChange:
    return TensorChange(shard.name, stored.dtype, stored.shape, stored.narrowed(narrowing.kept[stored.name]))


def _write_notes(folder: Path, plan: Plan, manifest: Manifest, shards: Sequence[Shard]) -> None:
    """The index, where there was one, the plan, and last the manifest."""
    index = shards[0].index
    if index is not None:
        total = sum(change.bytes for change in manifest.tensors.values())
        places = {name: change.file for name, change in manifest.tensors.items()}
        content = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / index, json.dumps(content, indent=2))
    _write_json(folder / "plan.json", json.dumps(plan.to_dict(), indent=1))
    _write_json(folder / "manifest.json", manifest.to_text())


def _write_json(path: Path, text: str) -> None:
    with replacing(path, CheckpointError) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
