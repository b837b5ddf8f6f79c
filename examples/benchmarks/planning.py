"""The seconds of what follows or precedes scoring: plans for ResNet-50, groups of every torchvision CNN.

    python examples/benchmarks/planning.py [--quick]

scoring.py includes these tables in its page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import CONSOLE, Table, child, parser, seconds, short, show
from rich.progress import track
from torchvision_zoo import ALPHA, QUICK, build, names

import fxprune

SIZE = 224
LIMIT = 600.0


def plan_times(repeats: int) -> dict[str, float]:
    """Median and longest seconds of `Scores.plan` for torchvision's ResNet-50, over a row of alphas."""
    scores = fxprune.Scores.random(build("resnet50"), torch.randn(1, 3, SIZE, SIZE), seed=0)
    scores.plan(alpha=ALPHA)
    times = [seconds(partial(scores.plan, alpha=step / repeats / 2)) for step in range(repeats)]
    return {"median": statistics.median(times), "longest": max(times), "repeats": repeats}


def couple_times(name: str) -> dict[str, float]:
    """Seconds of `couple` and of three forward passes of one image, medians of three, after a warm-up."""
    model, image = build(name), torch.randn(1, 3, SIZE, SIZE)
    graph = fxprune.capture(model, image)
    with torch.inference_mode():
        model(image)
        forward = statistics.median([seconds(lambda: model(image)) for _ in range(5)])
    fxprune.couple(graph)
    couple = statistics.median([seconds(lambda: fxprune.couple(graph)) for _ in range(3)])
    return {"couple": couple, "three": 3 * forward, "bound": max(1.0, 3 * forward)}


def plan_table(times: dict[str, float]) -> Table:
    """The time of a plan."""
    row = ("resnet50", short(times["median"]), short(times["longest"]), f"{times['repeats']:.0f}")
    return Table("Time of scores.plan(alpha)", ("network", "median", "longest", "plans"), (row,))


def couple_table(results: Sequence[dict[str, Any]]) -> Table:
    """The time of the groups, against three forward passes."""
    note = (
        "couple: groups of a captured graph, median of three; three forward passes: of one 224 x 224 image. "
        "within: couple takes less than the longer of these passes and one second."
    )
    rows = tuple(_cells(result) for result in results)
    return Table("Time of couple", ("network", "couple", "three forward passes", "ratio", "within"), rows, note)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in result:
        return (result["model"], f"failed: {result['failed']}", "", "", "")
    couple, three = result["couple"], result["three"]
    return (
        result["model"],
        short(couple),
        short(three),
        f"{couple / three:.2f}",
        _yes(couple < result["bound"]),
    )


def _yes(holds: bool) -> str:  # noqa: FBT001
    return "yes" if holds else "NO"


def measure_planning(*, quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Both tables and their figures; each network in a process of its own."""
    plans = plan_times(20 if quick else 200)
    couples = [
        {"model": name, **child(__file__, "--child", name, limit=LIMIT)}
        for name in track(QUICK if quick else names(), description="couple", console=CONSOLE)
    ]
    return [plan_table(plans), couple_table(couples)], {"plan": plans, "couple": couples}


def main() -> None:
    """Print both tables."""
    options: argparse.Namespace = parser("seconds of plan and couple").parse_args()
    if options.child:
        CONSOLE.file.write(json.dumps(couple_times(options.child)) + "\n")
        return
    show(measure_planning(quick=options.quick)[0])


if __name__ == "__main__":
    main()
