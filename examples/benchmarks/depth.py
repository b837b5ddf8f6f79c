"""Depth against width: quality and latency where branches are removed whole, where layers get narrower, or both.

    FXPRUNE_DATA=... python examples/benchmarks/depth.py [--quick] [--only language] [--shares 0.8 0.5]

Every row is `compress` at a share of the multiply-accumulates, by measured curves, and refitted. Latencies are measured
in turns, and are ratios to the original's.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import CONSOLE, Table, parser, publish
from oneshot import shown
from oneshot_models import Workload, macs, workload
from torch import Tensor, nn

import fxprune

MODELS = {"language": "a LLaMA of 6 layers", "resnet56": "ResNet-56, CIFAR-10"}
WAYS: dict[str, Any] = {"width": False, "depth": "only", "both": True}
BATCHES, ROUNDS = (1, 32), 30
NOTE = (
    '- width: `blocks=False`; depth: `blocks="only"`; both: `blocks=True`; all with `allocate="measured"`.\n'
    "- Branches are an attention, an MLP, or the inner branch of a block of the ResNet.\n"
    "- Times as fast: the original's lowest time over that of the row, of {rounds} each in turns, on one thread."
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
    for share in options.shares:
        for way, blocks in WAYS.items():
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
    """A table for each model."""
    columns = ("branches and share of the MACs", "left", "quality", "branches removed",
               *(f"times as fast, batch {n}" for n in BATCHES))  # fmt: skip
    return [
        Table(
            title, columns,
            tuple((r["way"], f"{r['left']:.2f}", shown(r), str(r["branches"]), *(f"{x:.2f}" for x in r["faster"]))
                  for r in rows if r["model"] == name),
            NOTE.format(rounds=ROUNDS),
        )
        for name, title in MODELS.items() if any(r["model"] == name for r in rows)
    ]  # fmt: skip


def main() -> None:
    """Write depth.md and .json."""
    options = parser("depth against width", "depth")
    options.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, default=list(MODELS))
    options.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.5])
    given = options.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in given.only:
        rows += compared(name, workload(name, Path(), quick=given.quick), given)
        publish("depth", "Depth against width", tables(rows), rows, given)


if __name__ == "__main__":
    main()
