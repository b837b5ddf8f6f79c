"""What compensation costs, level by level, beside scoring and beside a short training.

    FXPRUNE_DATA=... python examples/benchmarks/compensation.py [--quick]

For each network: one plan at a share of the MACs, and `fxprune.apply` with that plan at every level of compensation.
All levels, `fxprune.score` and three plain training epochs over the same calibration batches take turns after a
warm-up; medians are compared. A level's own cost is what it takes beyond `apply` without compensation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from measure import CONSOLE, Table, interleaved, parser, publish, short, write
from torch import nn

import fxprune
from fxprune.recovery.compensate import LEVELS

NETWORKS = ("resnet20", "resnet56")
BUDGET = 0.6  # of the MACs
EPOCHS = 3
HEADING = "Cost of compensation"
NOTE = (
    "{images:,} images, batches of 100, medians of {repeats}.\n\n"
    "- apply: the whole call, to {budget:.0%} of the MACs (multiply-accumulate operations).\n"
    "- added: its time minus that of `compensate=\"none\"`; then its ratio to one `fxprune.score`, and to {epochs} "
    "epochs of plain training (train mode, SGD) of the whole network on the same images."
)  # fmt: skip


def train(model: nn.Module, batches: cifar.Batches) -> None:
    """Plain training of a copy: forward, backward, and a step of SGD for every batch of every epoch."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def jobs(model: nn.Module, batches: cifar.Batches) -> dict[str, Callable[[], object]]:
    """Scoring, training, and every level of compensation, from scores and a plan that are made once."""
    scores = fxprune.score(model, batches, progress=False)
    plan = scores.plan(macs=BUDGET)
    applied = partial(fxprune.apply, model, plan, scores=scores, loader=batches)
    return {
        "score": partial(fxprune.score, model, batches, progress=False),
        "train": partial(train, model, batches),
        **{level: partial(applied, compensate=level) for level in LEVELS},
    }


def measured(network: str, batches: cifar.Batches, repeats: int) -> dict[str, float]:
    """Median seconds of every job."""
    CONSOLE.print(f"{network}: {repeats} rounds")
    times = interleaved(jobs(cifar.trained(network), batches), repeats=repeats)
    return {name: statistics.median(taken) for name, taken in times.items()}


def rows(network: str, found: dict[str, float]) -> list[tuple[str, ...]]:
    """One row a level."""
    lines = []
    for level in LEVELS:
        extra = found[level] - found["none"]
        ratios = (extra / found["score"], extra / found["train"])
        own = ("", "", "") if level == "none" else (short(extra), *(f"{ratio:.2f}" for ratio in ratios))
        lines.append((network, level, short(found[level]), *own, short(found["score"]), short(found["train"])))
    return lines


def table(data: dict[str, dict[str, float]], images: int, repeats: int) -> Table:
    """All networks and levels."""
    training = f"{EPOCHS} epochs"
    columns = ("network", "level", "apply", "added", "added / score", f"added / {training}", "score", training)
    found = tuple(row for network, times in data.items() for row in rows(network, times))
    note = NOTE.format(images=images, repeats=repeats, budget=BUDGET, epochs=EPOCHS)
    return Table("Compensation beside scoring and training", columns, found, note)


def main() -> None:
    """Run both networks, print the table, and write compensation.md and compensation.json after each."""
    options: argparse.Namespace = parser("what compensation costs", "compensation").parse_args()
    networks, per_class, repeats = (NETWORKS[:1], 20, 1) if options.quick else (NETWORKS, 100, 5)
    batches = cifar.batches_of(*cifar.calibration_set(per_class))
    data: dict[str, Any] = {}
    for network in networks:
        data[network] = measured(network, batches, repeats)
        write("compensation", HEADING, [table(data, 10 * per_class, repeats)], data, options)
    publish("compensation", HEADING, [table(data, 10 * per_class, repeats)], data, options)


if __name__ == "__main__":
    main()
