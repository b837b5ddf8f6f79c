"""The safetensors files of a checkpoint: their tensors, and narrowed copies of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.caller.files import regular
from fxprune.errors import CheckpointError
from fxprune.rewriting.remaining import narrow
from fxprune.saving.container import check_header_size
from fxprune.saving.sharded.narrowing import Kept

INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its dtype in the notation of safetensors, its shape, and the bytes of one entry."""

    dtype: str
    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors by name and its metadata.

    `identity` changes when the file does; `index` is the name of the index that lists the file, or None.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    identity: str
    index: str | None

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name


def shards_of(source: Path) -> list[Shard]:
    """The files of a checkpoint. Raises CheckpointError where there are none, or the index does not fit them."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder: name the folder that holds the safetensors files")
    indices = sorted(source.glob(f"*{INDEX}"))
    files = sorted(path for path in source.glob("*.safetensors") if not path.name.startswith("."))
    if len(indices) > 1 or (not indices and len(files) != 1):
        raise CheckpointError(
            f"{source} holds {len(indices)} files *{INDEX} and {len(files)} safetensors files: it needs one index, or "
            "no index and one file"
        )
    if not indices:
        return [_shard(files[0], None)]
    index = indices[0]
    weight_map = _weight_map(index)
    shards = [_shard(source / name, index.name) for name in dict.fromkeys(weight_map.values())]
    held = {name: shard.name for shard in shards for name in shard.tensors}
    for shard in shards:
        for name in shard.tensors:
            if weight_map.get(name) != shard.name:
                raise CheckpointError(f"{shard.path} holds {name}, which {index} puts into {weight_map.get(name)}")
    if lost := [name for name in weight_map if name not in held]:
        raise CheckpointError(f"{index} puts {lost[0]} into {weight_map[lost[0]]}, which does not hold it")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index."""
    regular(index, CheckpointError, "read")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("its weight_map is no mapping of names")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names the file {name!r}, which is no safetensors file beside it")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({type(error).__name__}: {error})") from error
    return weight_map


def _shard(path: Path, index: str | None) -> Shard:
    """A file's description of its tensors; safetensors checks that they fill it, without gaps or overlaps."""
    regular(path, CheckpointError, "read")
    try:
        check_header_size(path, CheckpointError)
        state = path.stat()
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: _stored(file, name, path) for name in names}
            metadata = dict(sorted((file.metadata() or {}).items()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is cut off or damaged ({error})") from error
    header = hashlib.sha256(repr((metadata, tensors)).encode()).hexdigest()
    return Shard(path, tensors, metadata, f"{state.st_size} {state.st_mtime_ns} {header}", index)


def _stored(file: Any, name: str, path: Path) -> Stored:
    described = file.get_slice(name)
    dtype, shape = described.get_dtype(), tuple(described.get_shape())
    try:
        tensor = file.get_tensor(name)  # it is mapped into memory: nothing is read
    except (SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{name} in {path} has the dtype {dtype}, which cannot be read ({error})") from error
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} in {path} has the dtype {dtype}, which packs several entries into one byte")
    return Stored(dtype, shape, tensor.itemsize)


def write_shard(shard: Shard, kept: Mapping[str, Kept], path: Path) -> None:
    """Write the kept entries of some tensors of a shard to a new file; they are in memory together."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            tensors = {name: narrow(file.get_tensor(name), masks) for name, masks in kept.items()}
            save_file(tensors, path, dict(shard.metadata) or None)
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be written ({error}): is there room?") from error
    if len(shard.metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header, which safetensors writes in any order: equal runs have to give equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, "the same entries in another order have the same length"
        file.seek(8)
        file.write(text)
