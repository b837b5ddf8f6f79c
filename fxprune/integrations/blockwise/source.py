"""A checkpoint of a decoder in a folder: its class without numbers, the list of its blocks, and tensors by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fxprune.caller.files import regular
from fxprune.caller.isolation import undisturbed
from fxprune.caller.tensors import aliases_of
from fxprune.errors import CheckpointError, NarrowError, error_text
from fxprune.integrations.class_saving import CONFIG
from fxprune.integrations.huggingface import configurations
from fxprune.saving.sharded.shards import Shard, shards_of

DTYPE = torch.float32  # in which blocks are run and refitted, whatever dtype the files have


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A checkpoint in a folder.

    `model` is its class in eval mode, whose buffers have numbers and whose parameters have none; its configuration has
    no cache, `config` is the one in the folder. `path` leads to the list of the blocks, and `files` from the name of a
    tensor to its file.
    """

    folder: Path
    shards: Sequence[Shard]
    config: PretrainedConfig
    model: PreTrainedModel
    path: str
    files: Mapping[str, Path]

    @property
    def blocks(self) -> list[str]:
        """The paths of the blocks."""
        return [f"{self.path}.{number}" for number in range(len(self.model.get_submodule(self.path)))]  # type: ignore[arg-type]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor in its file."""
        return next(iter(tensors_of(self.files, [name])))[1].dtype


def source_of(folder: Path) -> Source:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it has no configuration of a class of transformers, or its files lack tensors of the class.
        NarrowError: the class has no list of blocks.
    """
    shards = shards_of(folder)
    config, kind = _class_of(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{folder} holds quantized weights: prune the model before it is quantized")
    model = without_numbers(kind, config)
    files = {name: shard.path for shard in shards for name in shard.tensors}
    held = model.state_dict(keep_vars=True)
    aliases = aliases_of(held)
    known = {aliases.get(name, name) for name in files}
    head: Any = model.get_output_embeddings()  # it is copied, under any name, and not run
    unused = {id(tensor) for tensor in ([] if head is None else head.parameters())}
    lost = [name for name, t in held.items() if aliases.get(name, name) not in known and id(t) not in unused]
    if lost:
        raise CheckpointError(
            f"{folder} lacks {lost[0]} {tuple(held[lost[0]].shape)}, which {kind.__name__} has ({len(lost)} of "
            f"{len(held)} tensors are missing): block by block, the files need the names of the class; where they have "
            "others, use compress_pretrained on the whole model"
        )
    for shard in shards:
        for name, stored in shard.tensors.items():
            if name in held and stored.shape != tuple(held[name].shape):
                raise CheckpointError(
                    f"{name} is {stored.shape} in {shard.path}, and {tuple(held[name].shape)} by {CONFIG}: the folder "
                    "holds files of two models"
                )
    return Source(folder, shards, config, model, _path_of_blocks(model), files)


def _class_of(folder: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The configuration in a folder, and the class that it names."""
    regular(folder / CONFIG, CheckpointError, "read")
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        name = str((config.architectures or ["none"])[0])
    except Exception as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read ({error_text(error)}): name a folder that save_pretrained of "
            "transformers wrote"
        ) from error
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise CheckpointError(f"{folder / CONFIG} names the class {name}, which transformers does not have: update it")
    return config, kind


def without_numbers(kind: type[PreTrainedModel], config: PretrainedConfig) -> Any:
    """A model of a class in eval mode, without a cache, whose parameters take no memory; its buffers have numbers."""
    own = copy.deepcopy(config)
    own.dtype = DTYPE
    with undisturbed(), _parameters_on_meta():
        model: Any = kind(own)
        model.to(DTYPE)
    for each in configurations(model):
        each.update({"use_cache": False} if "use_cache" in each.to_dict() else {})
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules have parameters on the meta device, and buffers where they are made."""

    def moved(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook: Any = moved  # which torch declares without a result
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _path_of_blocks(model: PreTrainedModel) -> str:
    """The path of the one list that holds a module for each of the model's layers."""
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise NarrowError(
            f"{type(model).__name__} has {len(outer)} lists of {count} blocks ({', '.join(outer) or 'none'}), and is "
            "pruned block by block only with one: use compress_pretrained on the whole model, with plain=True"
        )
    return str(outer[0])


def tensors_of(files: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names, one at a time; they are mapped into memory, and nothing is read until they are used."""
    for name in names:
        with safe_open(files[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def filled(module: nn.Module, prefix: str, files: Mapping[str, Path]) -> nn.Module:
    """A copy of a module of `Source.model` with the numbers of the files, where its names begin with `prefix`."""
    own = copy.deepcopy(module)
    names = {f"{prefix}.{name}": name for name in own.state_dict()}
    state = {names[name]: tensor.to(DTYPE) for name, tensor in tensors_of(files, names)}
    own.load_state_dict(state, strict=True, assign=True)
    return own.requires_grad_(requires_grad=False)
