"""How costs grow: with samples, classes, layers, width and ranks; curves, with the peers where they can run.

    FXPRUNE_DATA=... python examples/benchmarks/scaling.py [--quick] [--only samples classes]

Networks for CIFAR with random weights, and noise. Every point runs in a process of its own, one after the other, with
a limit on its time; a curve ends where a point goes over it. Times are medians of three after a warm-up, or one run
without where a run takes longer than a few seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cifar
import torch
import torch.distributed as dist
import torchvision
from measure import CONSOLE, DOCS, Table, child, parser, publish, seconds, short
from original import quietly_elsewhere
from rich.progress import track
from scaling_plot import plot
from scoring import Work, noise, plain
from torch import nn

import fxprune
from fxprune.scoring.signals.separability import separability

LIMIT = 240.0
SLOW = 5.0  # seconds of a run that is not repeated
Job = Callable[[Work], object]


def score(work: Work, **options: Any) -> fxprune.Scores:
    """Scores over the batches."""
    model, batches = work
    return fxprune.score(model, batches, progress=False, **options)


def analysed(work: Work) -> nn.Module:
    """Everything but scoring: capture, groups, a plan, and the rewritten model."""
    model, batches = work
    return fxprune.apply(model, fxprune.Scores.random(model, batches[0][0][:2]).plan(macs=0.7))


def torch_pruning(work: Work) -> nn.Module:
    """torch-pruning on a copy: its graph, the L2 magnitudes of its groups, and one step that keeps the stream."""
    import torch_pruning as tp

    model, batches = copy.deepcopy(work[0]), work[1]
    stream = [layer for name, layer in model.named_modules() if name.endswith("conv2") or name == "conv1"]
    importance = tp.importance.GroupMagnitudeImportance()
    ignored = [model.linear, *stream]
    tp.pruner.BasePruner(
        model, batches[0][0][:2], importance=importance, pruning_ratio=0.3, ignored_layers=ignored
    ).step()
    return model


def network_pruner(work: Work) -> object:
    """The metrics of network-pruner, on a copy: it moves the BatchNorm statistics."""
    from Network_Pruner import FAIR_Pruner

    model, batches = work
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with quietly_elsewhere():
        loader = cifar.loader_of(images, labels)
        return FAIR_Pruner.get_metrics(
            copy.deepcopy(model), loader, device=torch.device("cpu"), the_samplesize_for_compute_distance=10
        )


JOBS: dict[str, Job] = {
    "plain pass": plain,
    "score": score,
    "score, U-Score": partial(score, propose="separability"),
    "analysis": analysed,
    "torch-pruning": torch_pruning,
    "network-pruner": network_pruner,
}


def network(width: int = 1, layers: int = 20, classes: int = cifar.CLASSES) -> nn.Module:
    """A ResNet for CIFAR of so many layers, all of them `width` times as wide as usual."""
    return cifar.CifarResNet((layers - 2) // 6, classes, width=16 * width).eval()


@dataclass(frozen=True, slots=True)
class Curve:
    """What grows, its values, the jobs that are timed, and a value's network and batches."""

    what: str
    values: tuple[int, ...]
    jobs: tuple[str, ...]
    work: Callable[[int], Work]
    note: str


SCORING = ("plain pass", "score", "score, U-Score")
CURVES: dict[str, Curve] = {
    "samples": Curve(
        "samples", (250, 500, 1000, 2000, 4000), (*SCORING, "network-pruner"), lambda n: (network(), noise(n)),
        "ResNet-20, 10 classes",
    ),
    "classes": Curve(
        "classes", (2, 10, 100, 1000), (*SCORING, "network-pruner"),
        lambda k: (network(classes=k), noise(4000, classes=k)), "ResNet-20, 4,000 samples",
    ),
    "layers": Curve(
        "layers", (20, 32, 56, 110), (*SCORING, "analysis", "torch-pruning"),
        lambda n: (network(layers=n), noise(500)), "500 samples, 10 classes",
    ),
    "width": Curve(
        "times as wide", (1, 2, 4, 8), (*SCORING, "analysis", "torch-pruning"),
        lambda w: (network(width=w), noise(200)), "ResNet-20, 200 samples, 10 classes",
    ),
}  # fmt: skip
RANKS = Curve("ranks", (1, 2, 4), ("score",), lambda n: (network(), noise(n)), "ResNet-20, 4,000 samples")
MANY = (1000, 32)  # classes, and samples of each


def timed(job: Job, work: Work) -> float:
    """The median seconds of three runs after one; of a slow job, those of the one."""
    first = seconds(lambda: job(work))
    return first if first > SLOW else statistics.median(seconds(lambda: job(work)) for _ in range(3))


def on_ranks(images: int) -> None:
    """On every rank: `score` after a warm-up, between two barriers; rank 0 prints the seconds."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights on all ranks
    work = RANKS.work(images)
    score(work)
    dist.barrier()
    taken = seconds(lambda: (score(work), dist.barrier()))
    if dist.get_rank() == 0:
        CONSOLE.file.write(json.dumps({"seconds": taken}) + "\n")
    dist.destroy_process_group()


def ranks(size: int, images: int) -> dict[str, Any]:
    """`score` under torchrun on so many ranks of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
    done = subprocess.run(
        [*command, "--child", json.dumps(["ranks", "", images])], capture_output=True, text=True, timeout=LIMIT,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-200:]}


def many_classes(classes: int, samples: int) -> dict[str, float]:
    """The pass of torchvision's ResNet-50 over so many samples, with and without the U-Score, and what that takes.

    At 32 x 32 pixels, where a pass is quickest, and the U-Score weighs most.
    """
    batches = noise(classes * samples, classes=classes)
    model = torchvision.models.resnet50().eval()
    spent = [0.0]

    def clocked(*arguments: Any) -> Any:
        found: list[Any] = []
        spent[0] += seconds(lambda: found.append(separability(*arguments)))
        return found[0]

    fxprune.scoring.evidence.separability = clocked  # type: ignore[attr-defined]
    whole = seconds(lambda: score((model, batches), propose="separability", protect="taylor", sample_memory=1 << 33))
    return {"whole": whole, "u_score": spent[0], "rest": whole - spent[0]}


def run_child(kind: str, job: str, value: int) -> dict[str, Any]:
    """In a process of its own: one point."""
    warnings.simplefilter("ignore")
    if kind == "many":
        return many_classes(value, MANY[1])
    return {"seconds": timed(JOBS[job], CURVES[kind].work(value))}


def point(kind: str, job: str, value: int, *, limit: float = LIMIT) -> dict[str, Any]:
    """One point, in a child."""
    return child(__file__, "--child", json.dumps([kind, job, value]), limit=limit)


def curve(name: str, *, quick: bool) -> dict[str, dict[int, dict[str, Any]]]:
    """The points of every job of a curve; none behind one that failed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    values = CURVES[name].values[:2] if quick else CURVES[name].values
    points = [(job, value) for job in CURVES[name].jobs for value in values]
    for job, value in track(points, description=name, console=CONSOLE):
        own = found.setdefault(job, {})
        if not any("failed" in other for other in own.values()):
            own[value] = point(name, job, value)
    return found


def table(name: str, found: dict[str, dict[int, dict[str, Any]]]) -> Table:
    """A curve as a table: a row a job, a column a value."""
    curve = CURVES[name]
    values = sorted({value for points in found.values() for value in points})
    rows = tuple((job, *(cell(points.get(value)) for value in values)) for job, points in found.items())
    return Table(f"{name.capitalize()}", (curve.what, *(f"{value:,}" for value in values)), rows, f"{curve.note}.")


def cell(found: dict[str, Any] | None) -> str:
    """Seconds, or why there are none."""
    if found is None:
        return ""
    return f"failed: {found['failed']}" if "failed" in found else short(found["seconds"])


def table_of_ranks(found: dict[int, dict[str, Any]]) -> Table:
    """Seconds by the number of ranks, and how many times as fast as one."""
    alone = found[1].get("seconds")
    rows = tuple(
        (str(size), cell(point), f"{alone / point['seconds']:.2f}" if alone and "seconds" in point else "")
        for size, point in found.items()
    )
    note = f"{RANKS.note}, gloo, one thread per rank, on {os.cpu_count()} cores."
    return Table("Ranks", ("ranks", "score", "speed-up"), rows, note)


def table_of_many(found: dict[str, Any]) -> Table:
    """What the U-Score of many classes takes beside the pass."""
    row = ("",) * 3 if "failed" in found else (*(short(found[name]) for name in ("rest", "u_score")),
                                               f"{found['u_score'] / found['rest']:.2f}")  # fmt: skip
    note = (
        f"torchvision's ResNet-50 at 32 x 32, {MANY[0]:,} classes, {MANY[1]} samples each: the U-Score is the exact "
        "maximum over all pairs of classes."
    )
    columns = ("network", "rest of scoring", "U-Score", "ratio")
    return Table("Many classes", columns, (("resnet50", *row),), note)


HEADING = "Growth of costs"
NAMES = (*CURVES, "ranks", "many")


def main() -> None:
    """Run every curve, and write scaling.md, scaling.json and scaling.png after each."""
    options = parser("how costs grow", "scaling")
    options.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these only; the rest is kept")
    chosen: argparse.Namespace = options.parse_args()
    if chosen.child:
        kind, job, value = json.loads(chosen.child)
        if kind == "ranks":
            on_ranks(value)
        else:
            CONSOLE.file.write(json.dumps(run_child(kind, job, value)) + "\n")
        return
    for name in chosen.only:
        found = measured(name, quick=chosen.quick)
        write_page(name, found, chosen)


def measured(name: str, *, quick: bool) -> dict[Any, Any]:
    """The figures of one section."""
    if name == "ranks":
        sizes = RANKS.values[:2] if quick else RANKS.values
        return {size: ranks(size, 500 if quick else 4000) for size in track(sizes, description=name, console=CONSOLE)}
    if name == "many":
        return point("many", "", 20 if quick else MANY[0], limit=3600)
    return curve(name, quick=quick)


def write_page(name: str, found: dict[Any, Any], options: argparse.Namespace) -> None:
    """Print the section, and write the page with it and with what was found of the others before."""
    file = (options.out or DOCS) / "scaling.json"
    known = json.loads(file.read_text()) if file.exists() and not options.quick else {}
    data = {**known, name: json.loads(json.dumps(found))}  # with the keys that JSON has
    tables = [section(other, _with_numbers(data[other])) for other in NAMES if other in data]
    folder = publish("scaling", HEADING, tables, data, options)
    curves = {other: _with_numbers(data[other]) for other in CURVES if other in data}
    if "ranks" in data:
        curves["ranks"] = {RANKS.jobs[0]: _with_numbers(data["ranks"])}
    if folder is not None and curves:
        plot(curves, {**CURVES, "ranks": RANKS}, folder / "scaling.png")
        with (folder / "scaling.md").open("a") as text:
            text.write("\n![seconds against the growing quantity](scaling.png)\n")


def section(name: str, found: dict[Any, Any]) -> Table:
    """The table of one section."""
    return table_of_ranks(found) if name == "ranks" else table_of_many(found) if name == "many" else table(name, found)


def _with_numbers(found: Any) -> Any:
    """Nested dicts with numbers for the keys that JSON made texts of."""
    if not isinstance(found, dict):
        return found
    return {int(key) if str(key).isdigit() else key: _with_numbers(value) for key, value in found.items()}


if __name__ == "__main__":
    main()
