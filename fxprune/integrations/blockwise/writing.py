"""The files of the pruned folder: one for each block, one for each other tensor, the index and the configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from fxprune.caller.files import replacing
from fxprune.errors import CheckpointError
from fxprune.integrations.blockwise.source import Source, tensors_of
from fxprune.integrations.class_saving import CONFIG
from fxprune.saving.sharded.staging import Staging

INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", ".onnx")


def file_names(source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """The file of each tensor outside of the blocks, and that of each block."""
    others = [name for name in source.files if not name.startswith(f"{source.path}.")]
    count = len(others) + len(source.blocks)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return dict(zip(others, names, strict=False)), dict(zip(source.blocks, names[len(others) :], strict=True))


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of tensors in one step."""
    with replacing(path, CheckpointError) as unfinished:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished, {"format": "pt"})


def write_others(source: Source, staging: Staging, names: Mapping[str, str]) -> None:
    """Copy the tensors outside of the blocks, each into a file of its own."""
    for tensor, name in names.items():
        if staging.finished(name) is None:
            staging.put(name, partial(write_tensors, dict(tensors_of(source.files, [tensor]))))
            staging.finish(name)


def write_index(files: Iterable[str], path: Path) -> None:
    """Write the index of some files beside it."""
    weight_map, size = dict[str, str](), 0
    for name in files:
        with safe_open(path.with_name(name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                weight_map[key] = name
                size += file.get_tensor(key).nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    with replacing(path, CheckpointError) as unfinished:
        unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_rest(source: Source, config: PretrainedConfig, path: Path) -> None:
    """Write the configuration, and copy the tokenizer and all other files that hold no weights beside it."""
    config.save_pretrained(path.parent)
    for file in sorted(source.folder.iterdir()):
        other = file.name == CONFIG or file.name.startswith(".") or file.name.endswith(_WEIGHTS)
        if file.is_file() and not other:
            shutil.copyfile(file, path.with_name(file.name))
