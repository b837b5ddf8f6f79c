"""The safetensors file of an artefact, with a checksum of its header and one of each tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxprune.caller.file_kinds import check_kind
from fxprune.caller.files import regular, replacing
from fxprune.caller.tensors import FORMATS, RANKS, dtype_name, laid_out
from fxprune.errors import ArtifactError, FxpruneError
from fxprune.saving.header import FORMAT, LARGEST, Header

LIBRARY = {"format": "pt"}  # the metadata that other readers of safetensors look for
_DAMAGE = (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError)
FilePath = str | PathLike[str]


def write_artifact(path: FilePath, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write header and tensors in one step; see `replacing`."""
    text = header.to_text()
    metadata = LIBRARY | {"fxprune_artifact": str(FORMAT), "fxprune": text, "sha256": _sha256(text.encode())}
    with replacing(path, ArtifactError) as unfinished:
        try:
            save_file(dict(tensors), unfinished, metadata)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"{path} cannot be written ({error}): is there room, and are all tensors dense, of a dtype that "
                "safetensors has?"
            ) from error


def read_artifact(path: FilePath) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a file, which is mapped into memory; every checksum is compared.

    Raises ArtifactError where the file is missing, no artefact, of a newer format, cut off or altered.
    """
    place = regular(path, ArtifactError, "read")
    try:
        check_kind(place, "artifact", ArtifactError, allowed=["weights"])
        size = check_header_size(place, ArtifactError)
        if size > 2 * LARGEST:
            raise ArtifactError(f"{path} has a header of {size:,} bytes, more than the {2 * LARGEST:,} that are read")
        with safe_open(place, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            names = set(file.keys())
            if odd := sorted(names ^ set(header.tensors)):
                where = "holds" if odd[0] in names else "lacks"
                raise ArtifactError(
                    f"{path} was altered: it {where} the tensor {odd[0]}, against its header; get it anew"
                )
            return header, {name: _checked(path, name, file.get_tensor(name), header) for name in sorted(names)}
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}): name a file that fxprune.save wrote") from error
    except _DAMAGE as error:
        raise ArtifactError(
            f"{path} is not a model that fxprune.save wrote, or is cut off or damaged ({error}): get it anew"
        ) from error


def check_header_size(path: Path, error: type[FxpruneError]) -> int:
    """The bytes of the header of a safetensors file, by its first eight; OSError where it cannot be read.

    Raises `error` where the file is shorter than that.
    """
    with path.open("rb") as file:
        start, total = file.read(8), os.fstat(file.fileno()).st_size
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > total - 8:
        raise error(
            f"{path} is cut off, or no safetensors file: it has {total:,} bytes, and its header alone would need "
            f"{size + 8:,}; get it anew"
        )
    return size


def sha256_of(tensor: Tensor) -> str:
    """The SHA-256 of the bytes of a contiguous tensor on the CPU."""
    return _sha256(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else _sha256(b"")


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _header(path: FilePath, metadata: Mapping[str, str]) -> Header:
    """The header in the metadata of a safetensors file, its format and checksum compared."""
    if "fxprune_artifact" not in metadata or "fxprune" not in metadata:
        raise ArtifactError(
            f"{path} is a safetensors file without fxprune's header: load it as a state_dict, or name a file that "
            "fxprune.save wrote"
        )
    version, text = metadata["fxprune_artifact"], metadata["fxprune"]
    if version != str(FORMAT):
        raise ArtifactError(f"{path} has artefact format {version[:20]}, this fxprune reads {FORMAT}: update fxprune")
    if {**LIBRARY, "fxprune_artifact": version, "fxprune": text, "sha256": _sha256(text.encode())} != dict(metadata):
        raise ArtifactError(f"{path} was altered: its header does not have the checksum that it names; get it anew")
    return Header.of_text(text, path)


def _checked(path: FilePath, name: str, tensor: Tensor, header: Header) -> Tensor:
    """A tensor of the file, in the memory format that it had, after its shape, dtype and bytes were compared."""
    record = header.tensors[name]
    if (tuple(tensor.shape), dtype_name(tensor)) != (record.shape, record.dtype):
        raise ArtifactError(
            f"{path} was altered: {name} is {tuple(tensor.shape)} {dtype_name(tensor)}, its header says "
            f"{record.shape} {record.dtype}; get it anew"
        )
    if sha256_of(tensor) != record.sha256:
        raise ArtifactError(f"{path} was altered: the numbers of {name} do not have their checksum; get it anew")
    if record.memory_format is None:
        return tensor
    if RANKS.get(record.memory_format) != tensor.ndim:
        raise ArtifactError(f"{path}: {name} has {tensor.ndim} axes and the memory format {record.memory_format}")
    return laid_out(tensor, FORMATS[record.memory_format])
