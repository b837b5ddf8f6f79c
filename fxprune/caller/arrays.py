"""Named arrays of numbers in one .npz file, read without trusting the file."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fxprune.caller.files import replacing
from fxprune.errors import FxpruneError

Index = NDArray[np.int64]
Scalars = NDArray[np.float64]
Reals = NDArray[np.floating[Any]]  # of either precision
Flags = NDArray[np.bool_]

Array = NDArray[Any]
FREE, RATIO = 256 << 20, 64  # bytes that the arrays of any file may take, and how many more for each byte of the file
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # by the version of the format
BROKEN = (  # what reading a damaged file may raise
    ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def write(
    path: str | PathLike[str], arrays: Mapping[str, Array], error: type[FxpruneError], *, compressed: bool = True
) -> None:
    """Write arrays of numbers in one step, see `replacing`."""
    with replacing(path, error) as unfinished, zipfile.ZipFile(unfinished, "w") as file:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # without a date: equal arrays make equal files
            entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with file.open(entry, "w", force_zip64=True) as content:
                npy.write_array(content, np.asanyarray(array), allow_pickle=False)


def read(path: str | PathLike[str]) -> dict[str, Array]:
    """The arrays of a file; nothing is unpickled, and memory is taken only for data that the file holds.

    Raises OSError, or one of `BROKEN` where the file is damaged or would grow to more than 64 times its size.
    """
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        size, limit = sum(entry.file_size for entry in entries), FREE + RATIO * Path(path).stat().st_size
        if size > limit:
            raise ValueError(f"its arrays would take {size:,} bytes, more than {limit:,}")
        return {entry.filename.removesuffix(".npy"): _array(file, entry) for entry in entries}


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    with file.open(entry) as content:
        version = npy.read_magic(content)
        if version not in _HEADERS:
            raise ValueError(f"it has the array format {version}")
        shape, fortran, dtype = _HEADERS[version](content)  # numpy reads a literal of at most 10,000 bytes
        if dtype.hasobject or dtype.kind not in "biufc":
            raise ValueError(f"{entry.filename} holds {dtype}, which are no numbers")
        count = math.prod(shape)
        if min(shape, default=1) < 0 or count * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename} says it holds {shape} numbers in {entry.file_size:,} bytes")
        data = content.read(count * dtype.itemsize + 1)
        if len(data) != count * dtype.itemsize or content.read(1):  # the end is read: zipfile compares the checksum
            raise ValueError(f"{entry.filename} holds {len(data):,} bytes of {count * dtype.itemsize:,}")
    array: Array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C").copy()
    return array
