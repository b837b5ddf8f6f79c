"""`compress_folder`: from a folder with a decoder to a folder with a narrower one, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from os import PathLike
from typing import Any
from zlib import crc32

from fxprune.caller.arguments import CHECKS, check, is_whole, wanted
from fxprune.caller.batches import batches
from fxprune.caller.files import folder as folder_at
from fxprune.caller.rank_batches import digest
from fxprune.caller.ranks import check_same, rank_and_size
from fxprune.errors import CheckpointError, DistributedError, PlanError
from fxprune.integrations.blockwise.passes import Run, plan_of, prune, release
from fxprune.integrations.blockwise.record import FolderReport, read_blocks
from fxprune.integrations.blockwise.source import Source, source_of
from fxprune.integrations.blockwise.whole import whole_of
from fxprune.integrations.blockwise.writing import INDEX, file_names, write_index, write_rest
from fxprune.integrations.class_saving import CONFIG
from fxprune.integrations.huggingface import arguments_of, columns
from fxprune.integrations.plain import narrowed_config
from fxprune.planning.allocation import MEASURED, RoundTo
from fxprune.planning.plan import kept_units
from fxprune.saving.sharded.staging import staged_together

SAME = "call it on all ranks with the same arguments, and the same loader over all samples"
LEVELS, WAYS = ("sequential", "none"), (MEASURED, "uniform")
CHECKS["memory"] = wanted(is_whole, "it is a whole number of bytes, at least 1")


def compress_folder(
    source: str | PathLike[str],
    target: str | PathLike[str],
    loader: Iterable[Any],
    *,
    params: float | None = None,
    macs: float | None = None,
    allocate: str = "uniform",
    round_to: RoundTo = 1,
    min_keep: int = 1,
    query_heads: bool = False,
    compensate: str = "sequential",
    seed: int = 0,
    memory: int = 1 << 30,
    resume: bool = True,
) -> FolderReport:
    """Prune a decoder of transformers that does not fit into memory: a checkpoint in, a plain checkpoint out.

    One block at a time has numbers. All are scored by their own outputs first; then all keep the same numbers of heads
    and of hidden units, by the sum of their curves, each its own best ones; then each is pruned, proven, refitted on
    what the pruned blocks before it give, and written. Numbers are float32 on the way, and in files as in the source.

    The target appears when everything is written. A run that ends early keeps its files beside it, in
    `.NAME.unfinished`; the next run of the same arguments continues there, with the same result.

    The ranks of a process group share the samples, and the first one writes; all have to see the same folders.

    Args:
        source: a folder as `save_pretrained` writes it: config.json, and safetensors files with their index.
        target: the folder to make; the tokenizer and other files of the source are copied into it.
        loader: re-iterable batches of token numbers: tensors, or dicts as a Trainer takes them, whose labels are not
            looked at. Either all batches have padding or none. The hidden states of all are kept.
        params, macs: the share of the parameters or of the multiply-accumulates to keep; one of them.
        allocate: "uniform", the same share of heads and of hidden units, or "measured", by the sum of the curves.
        round_to, min_keep: see `Scores.plan`.
        query_heads: see `couple`.
        compensate: "sequential" refits every layer to the original's values, "none" leaves the plain removal.
        seed: of the random projections and of the rows that are fitted.
        memory: bytes for the hidden states between two blocks, which are kept in a file beyond that, and for the values
            inside a block: as many samples are fitted to as they allow.
        resume: False starts anew, and deletes the files of an earlier run.

    Returns:
        The plan, and for each block the error of its proof and of its outputs.

    Raises:
        DistributedError: the ranks were called with other arguments, or there are fewer batches than ranks.
        CheckpointError: the source is no checkpoint of a class of transformers, the target exists, or a file cannot be
            written.
        NarrowError: the class has no list of blocks, or no field of its configuration says their widths.
        FxpruneError: one of its children, from the stage that failed.
    """
    check(compress_folder, locals())
    asked = {"params": params, "macs": macs}
    if sum(value is not None for value in asked.values()) != 1:
        raise PlanError("compress_folder takes one budget: pass params= or macs=, a share of the original's")
    if allocate not in WAYS:
        raise PlanError(f"allocate is {allocate!r}; block by block it is one of {', '.join(WAYS)}")
    if compensate not in LEVELS:
        raise PlanError(f"compensate is {compensate!r}; block by block it is one of {', '.join(LEVELS)}")
    goal = folder_at(target, CheckpointError, "written")
    own = source_of(folder_at(source, CheckpointError, "read"))
    identity: dict[str, Any] = {
        "options": [params, macs, allocate, round_to, min_keep, query_heads, compensate, seed, memory],
        "samples": _digest(own, loader), "sources": {shard.name: shard.identity for shard in own.shards},
    }  # fmt: skip
    of = "other arguments, other samples or another source"
    if (count := len(identity["samples"])) < (size := rank_and_size()[1]):
        raise DistributedError(f"the loader has {count} batches for {size} ranks: give at least one a rank")
    check_same("the call of compress_folder", f"one with the digest {crc32(repr(identity).encode()):08x}", SAME)
    with staged_together(goal, identity, by="compress_folder", of=of, resume=resume) as staging:
        whole = whole_of(own, loader, round_to, {"query_heads": True} if query_heads else {})
        release()
        run = Run(own, whole, loader, staging, compensate, seed, memory)
        plan = plan_of(run, {**asked, "allocate": allocate, "min_keep": min_keep})
        config = narrowed_config(own.config, whole.changes, whole.free, kept_units(plan, whole.free))
        prune(run, kept_units(plan, whole.coupling), config)
        others, blocks = file_names(own)
        found = tuple(read_blocks(staging.folder).values())
        staging.put(INDEX, partial(write_index, [*others.values(), *blocks.values()]))
        staging.put(CONFIG, partial(write_rest, own, config))
        if staging.writes:
            for path in staging.folder.glob("scores-*.npz"):
                path.unlink()
    before, after = own.config.to_dict(), config.to_dict()
    changed = {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}
    return FolderReport(plan, changed, found)


def _digest(source: Source, loader: Iterable[Any]) -> list[int]:
    """A checksum of the inputs of every batch."""
    unpack = partial(columns, *arguments_of(type(source.model)), None)
    return [digest(inputs) for inputs, _ in batches(loader, unpack)]
