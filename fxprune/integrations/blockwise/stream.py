"""The hidden states of the calibration samples on their way from block to block."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import batches, sample_count
from fxprune.caller.example import as_call
from fxprune.caller.isolation import full_float32, undisturbed
from fxprune.caller.rank_batches import RankShare
from fxprune.caller.ranks import rank_and_size, together
from fxprune.caller.tensors import aliases_of
from fxprune.errors import CalibrationError, CaptureError, blaming
from fxprune.integrations.blockwise.source import DTYPE, Source, tensors_of
from fxprune.integrations.huggingface import arguments_of, columns

Call = Mapping[str, Any]  # the arguments of a block beside the hidden states
Keep = Callable[[Tensor], Tensor]
SHOWN = 2  # batches that blocks are captured on
SHARED = 32  # different tensors that are looked through for one that calls share


@dataclass(slots=True, eq=False)
class Stream:
    """The hidden states (samples, positions, channels) that enter a block, for each batch.

    `name` is that of the block's argument for them, and `calls` the other arguments of every block, for each batch.
    Each of several ranks has a share of the batches: `own` are their places here, each with the number of its first of
    all `samples`. The first two batches are on every rank, so that blocks are captured alike.
    """

    name: str
    states: list[Tensor]
    calls: list[list[Call]]
    own: list[tuple[int, int]] = field(default_factory=list)
    samples: int = 0

    def copied(self, keep: Keep) -> Stream:
        """The same, with hidden states of its own."""
        return replace(self, states=[keep(each) for each in self.states])

    def share(self, block: int) -> RankShare:
        """The arguments of a block on this rank's batches, each with the numbers of its samples as targets."""
        batches = [
            (first, self.inputs(block, batch), torch.arange(first, first + len(self.states[batch])))
            for batch, first in self.own
        ]
        return RankShare(batches, self.samples)

    def inputs(self, block: int, batch: int) -> dict[str, Any]:
        """The arguments of a block on a batch."""
        return {self.name: self.states[batch], **self.calls[block][batch]}

    def through(self, module: nn.Module, block: int) -> None:
        """Replace the hidden states by the outputs of a block, in place."""
        with together("running a block"), undisturbed(), full_float32(), torch.no_grad():
            for batch, states in enumerate(self.states):
                with blaming(f"block {block} of the model", f"batch {batch}"):
                    states.copy_(module(**self.inputs(block, batch)))


def keeper(folder: Path, memory: int) -> Keep:
    """A function that copies tensors: into memory up to so many bytes, and from then on into files in `folder`.

    Each file vanishes with its tensor.
    """
    used = 0

    def kept(tensor: Tensor) -> Tensor:
        nonlocal used
        used += tensor.nbytes
        if used <= memory:
            return tensor.detach().clone()
        with (
            blaming("keeping the hidden states", f"a file of {tensor.nbytes:,} bytes in {folder}", ": is there room?"),
            TemporaryFile(dir=folder) as file,
        ):
            file.truncate(tensor.nbytes)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(tensor.shape))).copy_(tensor)

    return kept


class _PassedError(Exception):
    """Ends a forward pass after its last block."""


def stream_into(source: Source, loader: Iterable[Any], keep: Keep) -> Stream:
    """What enters the first block on every batch of a loader, and the other arguments of all blocks.

    Raises:
        CaptureError: the model does not hand the output of each block to the next one as it is.
        CalibrationError: the model fails on a batch, or batches give the blocks arguments of other kinds.
    """
    rank, size = rank_and_size()
    unpack = partial(columns, *arguments_of(type(source.model)), None)
    with undisturbed(), full_float32(), torch.no_grad():
        model = _without_blocks(source)
        blocks: Any = model.get_submodule(source.path)
        stream = Stream(list(inspect.signature(type(blocks[0]).forward).parameters)[1], [], [[] for _ in blocks])
        passed, shared = dict[str, Tensor](), list[Tensor]()
        for number, block in enumerate(blocks):
            block.forward = partial(_record, stream, source, number, block, passed, shared, keep)
        for batch, (inputs, _) in enumerate(batches(loader, unpack)):
            first, stream.samples = stream.samples, stream.samples + sample_count(inputs)
            if batch % size == rank:
                stream.own.append((len(stream.states), first))
            elif batch >= SHOWN:
                continue
            args, kwargs = as_call(inputs)
            with blaming(type(model).__name__, f"batch {batch} of the loader"):
                try:
                    model(*args, **kwargs)
                except _PassedError:
                    continue
            raise CaptureError(
                f"{type(model).__name__} does not run {source.blocks[-1]} on batch {batch} of the loader: "
                "use compress_pretrained on the whole model"
            )
    return stream


def _without_blocks(source: Source) -> nn.Module:
    """A copy of the model in which all but the blocks has numbers; they are made float32 where they are used."""
    model = copy.deepcopy(source.model)
    held = model.state_dict(keep_vars=True)
    aliases = aliases_of(held)
    stored = {aliases.get(name, name): name for name in source.files}
    names = [name for name in held if not name.startswith(f"{source.path}.") and aliases.get(name, name) in stored]
    found = dict(tensors_of(source.files, {stored[aliases.get(name, name)] for name in names}))
    state = {name: found[stored[aliases.get(name, name)]] for name in names}
    model.load_state_dict(state, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # a large table, of which a few rows are read
            module.register_forward_hook(lambda _, __, output: output.to(DTYPE))
        elif any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda own, _: own.to(DTYPE) and None)
    return model


def _record(
    stream: Stream, source: Source, number: int, block: nn.Module, passed: dict[str, Tensor], shared: list[Tensor],
    keep: Keep, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Stand for the forward of a block: note its arguments, and hand on the hidden states as they are."""
    signature = inspect.signature(type(block).forward)
    given = dict(signature.bind(block, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif name in given and given[name] is parameter.default:
            del given[name]
    given.pop("self", None)
    states = given.pop(stream.name)
    if number and states is not passed["on"]:
        raise CaptureError(
            f"{type(source.model).__name__} does not hand the output of {source.blocks[number - 1]} to "
            f"{source.blocks[number]} as it is: use compress_pretrained on the whole model"
        )
    if not number:
        stream.states.append(keep(states))
    call = pytree.tree_map_only(Tensor, partial(_shared, shared), given)
    known = stream.calls[number]
    if known and _form(call) != _form(known[0]):
        raise CalibrationError(
            f"batch {len(known)} of the loader gives {source.blocks[number]} other kinds of arguments than batch 0, "
            f"{_form(call)} and {_form(known[0])}: give all batches padding, or none of them"
        )
    known.append(call)
    if number + 1 == len(source.blocks):
        raise _PassedError
    passed["on"] = states.view_as(states)
    return passed["on"]


def _shared(shared: list[Tensor], tensor: Tensor) -> Tensor:
    """A tensor of an earlier call that equals this one, or this one."""
    for other in shared:
        if other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor):
            return other
    if len(shared) < SHARED:
        shared.append(tensor)
    return tensor


def _form(call: Call) -> dict[str, str]:
    """The names of arguments, and their types."""
    return {name: type(value).__name__ for name, value in call.items()}
