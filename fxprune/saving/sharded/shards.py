"""The files of a checkpoint: read by rows, written as a stream."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from fxprune.caller.files import regular
from fxprune.errors import CheckpointError
from fxprune.saving.sharded.manifest import DTYPES, FileRecord
from fxprune.saving.sharded.narrowing import Kept

BLOCK = 32 << 20  # bytes that are read at once
LARGEST = 100_000_000  # bytes of a header, as of safetensors itself
INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: name, dtype, shape, and where its bytes start in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def itemsize(self) -> int:
        """The bytes of an entry."""
        return DTYPES[self.dtype]

    def narrowed(self, kept: Kept) -> tuple[int, ...]:
        """The shape that stays."""
        return tuple(size if index is None else len(index) for size, index in zip(self.shape, kept, strict=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, its notes, and what tells whether it changed.

    `index` is the name of the index that lists it, or None.
    """

    path: Path
    tensors: Mapping[str, Stored]
    notes: Mapping[str, str]
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
    places = _places(indices[0])
    shards = [_shard(source / name, indices[0].name) for name in dict.fromkeys(places.values())]
    _check_places(places, shards, indices[0])
    return shards


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says."""
    regular(index, CheckpointError, "read")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places:
            raise TypeError("its weight_map is no mapping of names")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names the file {name!r}, which is no safetensors file beside it")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({type(error).__name__}: {error})") from error
    return places


def _check_places(places: Mapping[str, str], shards: Sequence[Shard], index: Path) -> None:
    found = {name: shard.name for shard in shards for name in shard.tensors}
    for shard in shards:
        for name in shard.tensors:
            if places.get(name) != shard.name:
                raise CheckpointError(f"{shard.path} holds {name}, which {index} puts into {places.get(name)}")
    if lost := [name for name in places if name not in found]:
        raise CheckpointError(f"{index} puts {lost[0]} into {places[lost[0]]}, which does not hold it")


def _shard(path: Path, index: str | None) -> Shard:
    """What a file says of itself; safetensors checks that its tensors fill it, without gaps or overlaps."""
    regular(path, CheckpointError, "read")
    try:
        with path.open("rb") as file:
            start, state = file.read(8), os.fstat(file.fileno())
            size = int.from_bytes(start, "little")
            if len(start) < 8 or size > min(state.st_size - 8, LARGEST):
                raise ValueError(f"it has {state.st_size:,} bytes, and a header of {size:,}")
            text = file.read(size)
        with safe_open(os.fspath(path), framework="np"):
            pass
        content: dict[str, Any] = json.loads(text)
        notes = content.pop("__metadata__", None) or {}
        entries = sorted(content.items(), key=lambda item: (item[1]["data_offsets"][0], item[0]))
        tensors = {name: _stored(path, name, entry, 8 + size) for name, entry in entries}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except (SafetensorError, ValueError, TypeError, KeyError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is cut off or damaged ({error})") from error
    identity = f"{state.st_size} {state.st_mtime_ns} {hashlib.sha256(text).hexdigest()}"
    return Shard(path, tensors, notes, identity, index)


def _stored(path: Path, name: str, entry: Mapping[str, Any], offset: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{name} in {path} has the dtype {entry['dtype']}, whose entries cannot be told apart")
    return Stored(name, entry["dtype"], tuple(entry["shape"]), offset + entry["data_offsets"][0])


def write_shard(shard: Shard, tensors: Sequence[Stored], kept: Mapping[str, Kept], path: Path) -> FileRecord:
    """Write what stays of some tensors of a shard to a new file, entries of many bytes first."""
    ordered = sorted(tensors, key=lambda stored: -stored.itemsize)  # so that each starts at a multiple of its size
    digest, size = hashlib.sha256(), 0
    with shard.path.open("rb") as source, path.open("wb") as file:
        parts = (narrowed(source, stored, kept[stored.name], shard.path) for stored in ordered)
        chunk: Any
        for chunk in chain([_header(shard, ordered, kept)], *parts):
            size += file.write(chunk)
            digest.update(chunk)
    return FileRecord(digest.hexdigest(), size)


def _header(shard: Shard, ordered: Iterable[Stored], kept: Mapping[str, Kept]) -> bytes:
    """The first bytes of a safetensors file: the length of a JSON text, and that, filled up to a multiple of eight."""
    content: dict[str, Any] = {"__metadata__": dict(shard.notes)} if shard.notes else {}
    offset = 0
    for stored in ordered:
        shape = stored.narrowed(kept[stored.name])
        end = offset + math.prod(shape) * stored.itemsize
        content[stored.name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def narrowed(file: BinaryIO, stored: Stored, kept: Kept, path: Path) -> Iterator[Any]:
    """The bytes of what stays of a tensor, a block of rows at a time."""
    shape = stored.shape
    if all(index is None for index in kept):
        shape, kept = (math.prod(shape),), (None,)
    row = math.prod(shape[1:]) * stored.itemsize
    step = max(1, BLOCK // max(row, 1))
    for first in range(0, shape[0] if row else 0, step):
        count = min(step, shape[0] - first)
        rows = None if kept[0] is None else _between(kept[0], first, count)
        if rows is not None and not len(rows):
            continue
        file.seek(stored.start + first * row)
        data = file.read(count * row)
        if len(data) < count * row:
            raise CheckpointError(f"{path} is cut off within {stored.name}: get it anew")
        block = np.frombuffer(data, dtype=f"V{stored.itemsize}").reshape(count, *shape[1:])
        for axis, index in enumerate((rows, *kept[1:])):
            block = block if index is None else block.take(index, axis)
        yield np.ascontiguousarray(block).view(np.uint8).reshape(-1)


def _between(index: Any, first: int, count: int) -> Any:
    """Those of rising indices that lie in a block, counted from its start."""
    low, high = np.searchsorted(index, (first, first + count))
    return index[low:high] - first
