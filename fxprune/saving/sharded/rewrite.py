"""Narrowing a checkpoint in shards by a plan, shard by shard, for models larger than memory."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from torch import nn

from fxprune.caller.arguments import check
from fxprune.caller.files import folder, replacing
from fxprune.errors import CheckpointError
from fxprune.planning.plan import Plan
from fxprune.saving.sharded.manifest import FORMAT, FileRecord, Manifest, TensorChange, digest_of_plan
from fxprune.saving.sharded.narrowing import Kept, Narrowing, narrowing_of, shape_of
from fxprune.saving.sharded.shards import Shard, shards_of, write_shard
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
    """Narrow the weights in a folder of safetensors files by a plan, with at most one narrowed file in memory.

    The result holds the tensors of `apply`, bit by bit, in files of the same names, with an index, the plan
    and a manifest. The target appears when everything is written. An interrupted run keeps its finished files beside
    it, in `.NAME.unfinished`; the next run of the same arguments continues there, to the same bytes.

    Args:
        source_dir: a folder with `*.safetensors.index.json` and its shards, or with one safetensors file.
        plan: from `Scores.plan`.
        target_dir: the folder to make.
        model: of the architecture that the plan is for; its numbers are not used, it may be on the meta device.
        ignore: glob patterns of names of tensors in the files that the model does not have, and that are left out.
        resume: False starts anew, and deletes the files of an earlier run.

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
    digest = digest_of_plan(plan)
    identity = {"plan": digest, "left_out": left_out, "sources": {shard.name: shard.identity for shard in shards}}

    def complete(folder: Path) -> dict[str, FileRecord]:
        manifest = Manifest.load(folder / "manifest.json")
        return dict(manifest.files) if manifest.plan == digest else {}

    of = "another plan, other ignored tensors or another source"
    with staged(target, identity, by="rewrite_checkpoint", of=of, resume=resume, complete=complete) as staging:
        files: dict[str, FileRecord] = {}
        tensors: dict[str, TensorChange] = {}
        total = 0
        for shard in shards:
            kept = {name: narrowing.kept[name] for name in shard.tensors if name not in left_out}
            if kept:
                files[shard.name] = staging.finished(shard.name) or _write(shard, kept, staging)
            for name, masks in kept.items():
                stored = shard.tensors[name]
                after = shape_of(stored.shape, masks)
                tensors[name] = TensorChange(shard.name, stored.dtype, stored.shape, after)
                total += math.prod(after) * stored.itemsize
        manifest = Manifest(
            FORMAT, type(model).__name__, digest, files, tensors, tuple(left_out),
            _other_names(narrowing, tensors),
        )  # fmt: skip
        if shards[0].index is not None:
            weight_map = {name: change.file for name, change in tensors.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(staging.folder / shards[0].index, json.dumps(index, indent=2))
        _write_json(staging.folder / "plan.json", json.dumps(plan.to_dict(), indent=1))
        _write_json(staging.folder / "manifest.json", manifest.to_text())
    return manifest


def _write(shard: Shard, kept: Mapping[str, Kept], staging: Staging) -> FileRecord:
    with replacing(staging.folder / shard.name, CheckpointError) as unfinished:
        write_shard(shard, kept, unfinished)
    return staging.finish(shard.name)


def _other_names(narrowing: Narrowing, tensors: Collection[str]) -> dict[str, str]:
    """For every name that the files do not hold, the one under which they hold its tensor."""
    held = {narrowing.aliases.get(name, name): name for name in reversed([*tensors])}
    return {name: held[narrowing.aliases.get(name, name)] for name in narrowing.shapes if name not in tensors}


def _checked(shards: Sequence[Shard], narrowing: Narrowing, ignore: Sequence[str], model: str) -> list[str]:
    """The tensors to leave out. Raises CheckpointError where the files and the model hold different tensors."""
    left_out = []
    for shard in shards:
        for name, stored in shard.tensors.items():
            if name in narrowing.shapes:
                if stored.shape != narrowing.shapes[name]:
                    raise CheckpointError(
                        f"{name} is {stored.shape} in {shard.path}, and {narrowing.shapes[name]} in the {model} that "
                        "was given: build it with the arguments that the saved model had"
                    )
            elif any(fnmatchcase(name, pattern) for pattern in ignore):
                left_out.append(name)
            else:
                raise CheckpointError(
                    f"{shard.path} holds {name} {stored.shape}, which {model} does not have: pass model= of the class "
                    f"that was saved, or ignore=[{name!r}] to leave it out"
                )
    known = {narrowing.aliases.get(name, name) for shard in shards for name in shard.tensors}
    missing = [name for name in narrowing.shapes if narrowing.aliases.get(name, name) not in known]
    if missing:
        raise CheckpointError(
            f"{shards[0].path.parent} lacks {missing[0]} {narrowing.shapes[missing[0]]}, which {model} has "
            f"({len(missing)} of {len(narrowing.shapes)} tensors are missing): pass model= of the class that was saved"
        )
    return left_out


def _write_json(path: Path, text: str) -> None:
    with replacing(path, CheckpointError) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
