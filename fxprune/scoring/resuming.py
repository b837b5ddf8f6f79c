"""A scoring pass that continues where it was interrupted: its sums so far, in a file that is replaced on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.arrays import BROKEN, read, write
from fxprune.caller.files import regular
from fxprune.caller.rank_batches import Numbered, RankBatches, digest
from fxprune.caller.ranks import check_same, rank_and_size, summed
from fxprune.caller.typed_json import from_plain
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.scoring.original import Original
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import Sampler

FORMAT = 4
NAMES = ("total", "rows", "origin", "sums", "products", "waiting", "samples", "labels", "keys")  # of a probe's arrays


@dataclass(frozen=True, slots=True, eq=False)
class PassState:
    """All that a pass sums up: `totals`, the sums of the gates' gradients, and the contents of all other fields."""

    totals: list[Tensor]
    probes: list[Probe]
    sampler: Sampler
    original: Original

    @classmethod
    def of(cls, probes: list[Probe], sampler: Sampler) -> PassState:
        """The state before the first batch."""
        return cls(
            [torch.zeros(len(probe.weight), dtype=torch.float64) for probe in probes], probes, sampler, Original()
        )

    def merge_ranks(self, share: RankBatches) -> None:
        """Sum up over all ranks: each then has the state of a single rank after all batches, but for rounding.

        Raises DistributedError where a rank was lost, or the loaders of the ranks differ.
        """
        if rank_and_size()[1] > 1:
            remedy = "give all ranks the same loader, over all samples; each reads its share of it"
            check_same("the loader", str(share), remedy)
            for total, probe in zip(self.totals, self.probes, strict=True):
                total.copy_(summed(total))
                if probe.moment_sums is not None:
                    probe.moment_sums.merge_ranks(len(probe.units))
            self.sampler.merge_ranks()
            self.original.merge_ranks()

    def edges(self) -> int:
        """A number that tells these edges from others."""
        return crc32(repr([(probe.reads, probe.dim, probe.units.tolist()) for probe in self.probes]).encode())

    def arrays(self) -> dict[str, Any]:
        """The state of the probes as arrays, by the names `NAMES` and the number of the probe."""
        found = ({"total": total} | probe.state() for total, probe in zip(self.totals, self.probes, strict=True))
        return {f"{name}{i}": tensor.cpu().numpy() for i, own in enumerate(found) for name, tensor in own.items()}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Take the state that `arrays` gave."""
        for i, (total, probe) in enumerate(zip(self.totals, self.probes, strict=True)):
            own = {name: torch.from_numpy(arrays[f"{name}{i}"]) for name in NAMES if f"{name}{i}" in arrays}
            total.copy_(own["total"])
            probe.restore(own)


@dataclass(slots=True)
class PassCheckpoint:
    """The file of one rank, replaced whenever `every` more batches of a pass with these `settings` were read.

    `batches` were read so far, and `sum` is a digest of them.
    """

    path: Path
    every: int
    settings: Mapping[str, Any]
    batches: int = 0
    sum: int = 0

    @classmethod
    def at(cls, path: str | PathLike[str], every: int, settings: Mapping[str, Any]) -> PassCheckpoint:
        """The checkpoint at a path, to which the number of the rank is added where there are several."""
        rank, size = rank_and_size()
        own = regular(path if size == 1 else f"{path}.rank{rank}of{size}", CalibrationError, "written")
        if not own.parent.is_dir():
            raise CalibrationError(f"checkpoint is {path}, but there is no folder {own.parent}: make it first")
        return cls(own, every, {**settings, "ranks": size})

    def rest(self, feed: Iterator[Numbered], state: PassState) -> Iterator[Numbered]:
        """The batches that were not read yet; the file's state, of the batches before them, is put into `state`.

        Raises CalibrationError where the file is no such checkpoint, or was written by another pass.
        """
        last, wanted = self._resume(state) if self.path.exists() else (0, 0)
        for batch in feed:
            self.batches += 1
            self.sum = (self.sum * 1_000_003 + digest(batch[1:])) % (1 << 61)
            if self.batches > last:
                yield batch
                if self.batches % self.every == 0:
                    self._write(state)
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

    def _write(self, state: PassState) -> None:
        header = {
            "fxprune_scoring": FORMAT, "settings": dict(self.settings), "batches": self.batches, "sum": self.sum,
            "sampler": state.sampler.state(), "original": asdict(state.original),
        }  # fmt: skip
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        write(self.path, {"header": text, **state.arrays()}, CalibrationError, compressed=False)

    def _resume(self, state: PassState) -> tuple[int, int]:
        """Put the file's content into `state`; the number of batches that were read, and their digest."""
        try:
            arrays = read(self.path)
            header = json.loads(arrays.pop("header").tobytes())
            form, made = header["fxprune_scoring"], header["settings"]
            check_same_run(self.path, CalibrationError, (form, FORMAT), (made, self.settings), "remove the file")
            state.restore(arrays)
            state.sampler.restore(header["sampler"])
            state.original.restore(from_plain(Original, header["original"], "original"))
            return int(header["batches"]), int(header["sum"])
        except (*BROKEN, OSError) as error:
            raise CalibrationError(
                f"{self.path} is not a checkpoint that score wrote ({type(error).__name__}: {error}): remove it, or "
                "name another file"
            ) from error


def check_same_run(
    path: object, error: type[FxpruneError], formats: tuple[Any, int], settings: tuple[Any, Mapping[str, Any]],
    remedy: str,
) -> None:  # fmt: skip
    """Raise `error` where a checkpoint's format or settings, the first of each pair, are not the second."""
    form, known = formats
    if form != known:
        raise error(f"{path} has checkpoint format {form}, this fxprune reads {known}: update it")
    made, wanted = settings
    for name, value in wanted.items():
        if made.get(name) != value:
            raise error(
                f"{path} was written with {name}={made.get(name)!r}, and now it is {value!r}: go on with the same "
                f"model and options, or {remedy}"
            )
