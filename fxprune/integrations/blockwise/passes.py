"""The two passes over the blocks: one that scores them all, and one that prunes, refits and writes each."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fxprune.caller.arrays import Flags
from fxprune.caller.isolation import full_float32, undisturbed
from fxprune.errors import stage
from fxprune.integrations.blockwise.block import block_of, pruned, scored
from fxprune.integrations.blockwise.joint import joint_scores, units_in
from fxprune.integrations.blockwise.record import BLOCKS, BlockRecord, read_blocks, write_blocks
from fxprune.integrations.blockwise.source import DTYPE, Source, filled, without_numbers
from fxprune.integrations.blockwise.stream import Stream, keeper, stream_into
from fxprune.integrations.blockwise.whole import Whole
from fxprune.integrations.blockwise.writing import file_names, write_others, write_tensors
from fxprune.planning.plan import Plan
from fxprune.rewriting.own_class import compare
from fxprune.saving.sharded.staging import Staging
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import ModelGraph, example_of

PLAN = "plan.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A source, its whole model, the loader, the folder that is made, and the options of both passes."""

    source: Source
    whole: Whole
    loader: Iterable[Any]
    staging: Staging
    level: str
    seed: int
    memory: int

    def stream(self) -> Stream:
        """What enters the first block."""
        return stream_into(self.source, self.loader, keeper(self.staging.folder, self.memory))

    def module(self, path: str) -> nn.Module:
        """A block of the source with its numbers."""
        return filled(self.source.model.get_submodule(path), path, self.source.files)


def plan_of(run: Run, asked: Mapping[str, Any]) -> Plan:
    """Score the blocks that are not scored yet, and plan the whole model; or the plan of an earlier run."""
    staging, folder = run.staging, run.staging.folder
    if staging.finished(PLAN):
        return Plan.load(folder / PLAN)
    names = {path: f"scores-{number:05d}.npz" for number, path in enumerate(run.source.blocks)}
    left = [path for path, name in names.items() if staging.finished(name) is None]
    stream = run.stream()
    for number, path in enumerate(run.source.blocks[: _end(run, left)]):
        module = run.module(path)
        if path in left:
            block = block_of(path, number, module, stream, run.whole.limits, run.whole.coupled)
            found = scored(block, stream, coupled=run.whole.coupled, seed=run.seed, memory=run.memory)
            staging.put(names[path], found.save)
            staging.finish(names[path])
            _LOG.info("scored %s", path)
            del block, found
            release()
        if path != left[-1]:
            stream.through(module, number)
    parts = [(path, Scores.load(folder / name)) for path, name in names.items()]
    scores = joint_scores(run.whole.scores, parts)
    plan = scores.plan(**{**asked, **({"allocate": "uniform"} if scores.curves is None else {})})
    staging.put(PLAN, plan.save)
    staging.finish(PLAN)
    return plan


def prune(run: Run, keep: Flags, config: PretrainedConfig) -> None:
    """Prune, prove, refit and write the blocks that are not written yet, and the tensors outside of the blocks."""
    others, names = file_names(run.source)
    write_others(run.source, run.staging, others)
    target = without_numbers(type(run.source.model), config)
    left = [path for path, name in names.items() if run.staging.finished(name) is None]
    streams = (stream := run.stream()), stream.copied(keeper(run.staging.folder, run.memory))
    for number, path in enumerate(run.source.blocks[: _end(run, left)]):
        module = run.module(path)
        own = target.get_submodule(path)
        written = {f"{path}.{name}": run.staging.folder / names[path] for name in own.state_dict()}
        if path in left:
            block = block_of(path, number, module, streams[0], run.whole.limits, run.whole.coupled)
            units = units_in(run.whole.scores.sites, path, block.coupling.sites, block.coupling.units)
            how: Any = {"level": run.level, "seed": run.seed, "memory": run.memory}
            small, proof, done = pruned(block, keep[units], *streams, **how)
            state = _rounded(run.source, path, small)
            records = read_blocks(run.staging.folder)
            records[path] = BlockRecord(path, proof, *(done.chosen or (None, None)))
            run.staging.put(BLOCKS, partial(write_blocks, records))
            run.staging.put(names[path], partial(write_tensors, state))
            with stage("narrowing"), undisturbed(), full_float32():
                compare(filled(own, path, written), small, example_of(block.graph))
            run.staging.finish(names[path])
            _LOG.info("wrote %s", path)
            del block, small, state
            release()
        if path != left[-1]:
            for each, passed in zip(streams, (module, filled(own, path, written)), strict=True):
                each.through(passed, number)


def release() -> None:
    """Give back the memory of what is no longer used.

    Graphs hold each other in circles, and with them the numbers of a block; the allocator of glibc keeps freed pages.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _end(run: Run, left: list[str]) -> int:
    """The number of blocks up to the last one that is left to do."""
    return run.source.blocks.index(left[-1]) + 1 if left else 0


def _rounded(source: Source, path: str, small: ModelGraph) -> dict[str, torch.Tensor]:
    """The tensors of a pruned block by their names in the whole model, in the dtypes of the source.

    The block gets the same numbers.
    """
    state = {}
    for name, tensor in small.state_dict().items():
        state[f"{path}.{name}"] = tensor.detach().to(source.dtype_of(f"{path}.{name}"))
        tensor.copy_(state[f"{path}.{name}"].to(DTYPE))
    return state
