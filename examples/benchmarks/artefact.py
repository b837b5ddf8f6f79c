"""How large a saved model is, and how long it takes to write and to read.

    python examples/benchmarks/artefact.py [--quick]

torchvision's networks with random weights, pruned to half of their MACs. `fxprune.load` reads the file, compares every
checksum, makes the small model anew from the original architecture on the meta device, and loads the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from latency import build
from measure import MIB, Table, parser, publish, seconds, short
from torchvision import models

import fxprune

NETWORKS = ("mobilenet_v3_large", "resnet50", "vit_b_16")
REPEATS = 5


def measured(name: str, folder: Path) -> dict[str, float]:
    """Bytes on the disk, and median seconds."""
    model, images = build(name)
    small = fxprune.apply(model, fxprune.Scores.random(model, images, seed=0).plan(macs=0.5))
    file, whole, weights = folder / "small.safetensors", folder / "whole.pt", folder / "weights.pt"
    saving = median(lambda: fxprune.save(small, file))
    torch.save(model.state_dict(), whole)
    torch.save(small.state_dict(), weights)
    with torch.device("meta"):
        empty = models.get_model(name).eval()
    sizes = {kind: path.stat().st_size for kind, path in (("whole", whole), ("weights", weights), ("file", file))}
    times = {
        "save": saving,
        "load": median(lambda: fxprune.load(file, empty)),
        "weights_alone": median(lambda: read(weights)),
    }
    return {**sizes, **times}


def read(path: Path) -> Any:
    """A state_dict that was pickled, its numbers in memory."""
    return torch.load(path, weights_only=True)


def median(call: Callable[[], object]) -> float:
    """The median seconds of a few calls, after one."""
    call()
    return statistics.median(seconds(call) for _ in range(REPEATS))


def table(found: dict[str, dict[str, float]]) -> Table:
    """A row a network."""
    columns = (
        "network", "state_dict, original", "state_dict, pruned", "artefact", "artefact / state_dict", "save", "load",
        "torch.load",
    )  # fmt: skip
    rows = tuple(
        (
            name, *(f"{f[kind] / MIB:.1f} MiB" for kind in ("whole", "weights", "file")),
            f"{f['file'] / f['weights']:.3f}", *(short(f[what]) for what in ("save", "load", "weights_alone")),
        )
        for name, f in found.items()
    )  # fmt: skip
    note = (
        "An artefact is a file that `fxprune.save` writes. Beside the weights it holds the plan, the report and the "
        "checksums. `load` compares all of these, captures the original's architecture and rewrites it; `torch.load` "
        f"only reads the weights. Plans: macs=0.5, seeded random scores. Medians of {REPEATS}; the file is in the page "
        "cache."
    )
    return Table("Size and time of an artefact", columns, rows, note)


def main() -> None:
    """Measure every network and write artefact.md and artefact.json."""
    warnings.simplefilter("ignore")
    options: argparse.Namespace = parser("size and time of an artefact", "artefact").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = NETWORKS[:1] if options.quick else NETWORKS
        found = {name: measured(name, Path(folder)) for name in names}
    publish("artefact", "Saved models", [table(found)], found, options)


if __name__ == "__main__":
    main()
