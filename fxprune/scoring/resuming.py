"""A scoring pass that goes on where it was interrupted: what it has found, in a file that is replaced as it goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.arrays import BROKEN, read, write
from fxprune.caller.files import regular
from fxprune.caller.rank_batches import Numbered, digest
from fxprune.caller.ranks import rank_and_size
from fxprune.errors import CalibrationError
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import Sampler

FORMAT = 3


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a pass finds: the sums of the gates' gradients, and what probes and sampler keep."""

    totals: list[Tensor]
    probes: list[Probe]
    sampler: Sampler

    @classmethod
    def by(cls, probes: list[Probe], sampler: Sampler) -> Found:
        """What probes and sampler have found before the first batch: nothing."""
        return cls([torch.zeros(len(probe.weight), dtype=torch.float64) for probe in probes], probes, sampler)

    def edges(self) -> int:
        """A number that tells these edges from others."""
        return crc32(repr([(probe.reads, probe.dim, probe.units.tolist()) for probe in self.probes]).encode())

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays of numbers."""
        arrays: dict[str, Any] = {}
        for index, (total, probe) in enumerate(zip(self.totals, self.probes, strict=True)):
            found = {"total": total, **probe.state()}
            arrays |= {f"{name}{index}": tensor.cpu().numpy() for name, tensor in found.items()}
        return arrays

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Take what `arrays` gave."""
        for index, (total, probe) in enumerate(zip(self.totals, self.probes, strict=True)):
            names = ("total", *Probe.STATE)
            own = {name: torch.from_numpy(arrays[f"{name}{index}"]) for name in names if f"{name}{index}" in arrays}
            total.copy_(own.pop("total"))
            probe.restore(own)


@dataclass(slots=True)
class Checkpoint:
    """The file of one rank, written anew after `every` so many batches, by a pass with certain `settings`.

    `batches` are those that what was found is of, and `sum` is a digest of all of them.
    """

    path: Path
    every: int
    settings: Mapping[str, Any]
    batches: int = 0
    sum: int = 0

    @classmethod
    def at(cls, path: str | PathLike[str], every: int, settings: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint at a path, to which the number of the rank is added where there are several."""
        rank, size = rank_and_size()
        own = regular(path if size == 1 else f"{path}.rank{rank}of{size}", CalibrationError, "written")
        if not own.parent.is_dir():
            raise CalibrationError(f"checkpoint is {path}, but there is no folder {own.parent}: make it first")
        return cls(own, every, {**settings, "ranks": size})

    def rest(self, feed: Iterator[Numbered], found: Found) -> Iterator[Numbered]:
        """The batches that are yet to be read; what is known of those before them is put into `found`.

        Raises CalibrationError where the file is no such checkpoint, or was written by another pass.
        """
        last, wanted = self._resume(found) if self.path.exists() else (0, 0)
        for batch in feed:
            self.batches += 1
            self.sum = (self.sum * 1_000_003 + digest(batch[1:])) % (1 << 61)
            if self.batches > last:
                yield batch
                if self.batches % self.every == 0:
                    self._write(found)
            elif self.batches == last and self.sum != wanted:
                raise CalibrationError(
                    f"the loader's first {last} batches are not those that {self.path} was written with: give the "
                    "same loader, which shuffles by a seed if at all, or remove the file"
                )
        if self.batches < last:
            raise CalibrationError(
                f"{self.path} was written after {last} batches, and the loader gives {self.batches}: give the same "
                "loader, or remove the file"
            )

    def done(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _write(self, found: Found) -> None:
        header = {
            "fxprune_scoring": FORMAT, "settings": dict(self.settings), "batches": self.batches, "sum": self.sum,
            "sampler": found.sampler.state(),
        }  # fmt: skip
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        write(self.path, {"header": text, **found.arrays()}, CalibrationError, compressed=False)

    def _resume(self, found: Found) -> tuple[int, int]:
        """Put what the file holds into `found`; the number of batches that it is of, and their digest."""
        try:
            arrays = read(self.path)
            header = json.loads(arrays.pop("header").tobytes())
            self._check(header["fxprune_scoring"], header["settings"])
            found.restore(arrays)
            found.sampler.restore(header["sampler"])
            return int(header["batches"]), int(header["sum"])
        except (*BROKEN, OSError) as error:
            raise CalibrationError(
                f"{self.path} is not a checkpoint that score wrote ({type(error).__name__}: {error}): remove it, or "
                "name another file"
            ) from error

    def _check(self, form: Any, settings: Mapping[str, Any]) -> None:
        """Raise where the file has another format, or was written with other settings."""
        if form != FORMAT:
            raise CalibrationError(f"{self.path} has checkpoint format {form}, this fxprune reads {FORMAT}: update it")
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise CalibrationError(
                    f"{self.path} was written with {name}={settings.get(name)!r}, and now it is {value!r}: go on with "
                    "the same model and options, or remove the file"
                )
