"""Depth against width: quality and latency where branches are removed whole, where layers get narrower, or both.

    FXPRUNE_DATA=... python examples/benchmarks/depth.py [--quick] [--only language] [--weights FILE]

Every row is `compress` at a share of the multiply-accumulates, by measured curves, and refitted. Latencies are measured
in turns, and are ratios to the original's.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bottlenecks import trained_bottlenecks
from measure import CONSOLE, Table, parser, publish
from oneshot import shown
from oneshot_models import Workload, macs, workload
from torch import Tensor, nn

import fxprune

MODELS = {
    "language": "a LLaMA of 6 layers",
    "resnet56": "ResNet-56, CIFAR-10",
    "bottlenecks": "a ResNet of 16 bottlenecks, CIFAR-10",
}
WAYS: dict[str, Any] = {"width": False, "depth": "only", "both": True}
SHARES = {"width": (0.9, 0.7, 0.5, 0.4, 0.3, 0.2), "depth": (0.9, 0.8, 0.7, 0.6, 0.5), "both": (0.5,)}
BATCHES, ROUNDS = (1, 32), 60
NOTE = (
    '- width: `blocks=False`; depth: `blocks="only"`; both: `blocks=True`; all with `allocate="measured"`.\n'
    "- Branches are an attention, an MLP, or the inner branch of a block of the ResNet.\n"
    "- Times as fast: the original's lowest time over that of the row, of {rounds} each in turns, on one thread."
)
EQUAL = (
    "- Each row is a network without some branches, beside narrower ones of the same quality.\n"
    "- Width: between the two rows of the table above whose qualities are on either side; `>` is its narrowest row, "
    "where that is better still."
)


@torch.no_grad()
def latencies(models: dict[str, nn.Module], inputs: Tensor, rounds: int) -> dict[str, float]:
    """The lowest seconds of each model, all measured in turns, so that they share what else the machine does."""
    found = dict.fromkeys(models, math.inf)
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs)
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def of_size(work: Workload, count: int) -> Tensor:
    """A batch of so many inputs."""
    found: Tensor = torch.cat([inputs for inputs, _ in work.calibration])[:count]
    return found


def compared(name: str, work: Workload, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of all ways at all shares, and of the original."""
    original = fxprune.capture(work.model, work.example)
    models: dict[str, nn.Module] = {"original": original}
    for way, blocks in WAYS.items():
        for share in SHARES[way][::4] if options.quick else SHARES[way]:
            small = fxprune.compress(
                work.model, work.calibration, macs=share, blocks=blocks, allocate="measured", **work.options
            )
            models[f"{way}, {share:g}"] = small.eval()
            CONSOLE.print(f"{name}, {way}, {share:g}: {small.meta['fxprune'].plan.removed_branches}")
    times = {n: latencies(models, of_size(work, n), 3 if options.quick else ROUNDS) for n in BATCHES}
    return [
        {
            "model": name, "way": label, "left": macs(model, work.example) / macs(work.model, work.example),
            "accuracy": work.measure(model), "unit": work.unit,
            "branches": len(model.meta["fxprune"].plan.removed_branches) if model is not original else 0,
            "faster": [times[n]["original"] / times[n][label] for n in BATCHES],
        }
        for label, model in models.items()
    ]  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Two tables for each model: all rows, and latencies at equal quality."""
    found = []
    for name, title in MODELS.items():
        if own := [r for r in rows if r["model"] == name]:
            shares = ("branches and share of the MACs", "left", "quality", "branches removed")
            faster = [f"times as fast, batch {n}" for n in BATCHES]
            lines = tuple(
                (r["way"], f"{r['left']:.2f}", shown(r), str(r["branches"]), *(f"{x:.2f}" for x in r["faster"]))
                for r in own
            )
            found.append(Table(title, (*shares, *faster), lines, NOTE.format(rounds=ROUNDS)))
            columns = (
                "at the quality of",
                "quality",
                *(f"{way}, batch {n}" for n in BATCHES for way in ("depth", "width")),
            )
            found.append(Table(f"{title}: times as fast, at equal quality", columns, equal_quality(own), EQUAL))
    return found


def equal_quality(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    """For each row without branches, how many times as fast it is, and narrower networks of its quality."""
    sign = 1 if rows[0]["unit"] == "perplexity" else -1
    narrower = sorted(
        ((sign * r["accuracy"], r["faster"]) for r in rows if r["way"].startswith(("width", "original"))),
        key=lambda pair: pair[0],
    )
    loss, faster = np.array([x for x, _ in narrower]), np.array([x for _, x in narrower])
    found = []
    for row in (r for r in rows if r["way"].startswith("depth")):
        beyond = ">" if sign * row["accuracy"] > loss[-1] else ""
        pairs = zip(row["faster"], (np.interp(sign * row["accuracy"], loss, times) for times in faster.T), strict=True)
        cells = (cell for depth, width in pairs for cell in (f"{depth:.2f}", f"{beyond}{width:.2f}"))
        found.append((row["way"], shown(row), *cells))
    return tuple(found)


def main() -> None:
    """Write depth.md and .json."""
    options = parser("depth against width", "depth")
    options.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, default=list(MODELS))
    options.add_argument("--weights", type=Path, help="a file that keeps the weights of the bottlenecks, trained here")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            weights = given.weights or Path(folder) / "bottlenecks.pt"
            own = name == "bottlenecks"
            quick = given.quick
            work = trained_bottlenecks(weights, quick=quick) if own else workload(name, Path(), quick=quick)
            rows += compared(name, work, given)
            publish("depth", "Depth against width", tables(rows), rows, given)


if __name__ == "__main__":
    main()
