"""What scoring costs: time, memory, growth, the original package beside it, plans and groups.

    FXPRUNE_DATA=... python examples/benchmarks/scoring.py [--quick] [--only plans compress]

The measure of time is one plain pass over the same batches, in the same process and with the same threads: eval
mode, cross-entropy, gradients of every weight. Both take turns after a warm-up; medians are compared, and the
fastest runs. `score` includes everything that it does: capture, coupling, the pass, and the statistics after it.

The measure of memory is taken in child processes, one a job, so that neither finds the other's memory already
there. A child imports everything, builds the model, holds the batches, and runs one small forward pass; then the
kernel's high-water mark of resident memory is set back, the job runs once, and the growth is the new mark less
what was resident before. Medians of several children.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import cifar
import torch
import torch.nn.functional as F
import torchvision
from breakdown import Work, measured
from couple import measure_couple
from measure import CONSOLE, DOCS, Table, child, interleaved, parser, peak_growth, publish, seconds, short, write
from original import measure_original
from rich.progress import track

import fxprune

WORKLOADS = {"resnet56": 1000, "vgg11_bn": 300}  # images
LIMIT = 900.0


def workload(name: str, images: int) -> Work:
    """A model and batches of 100: ResNet-56's checkpoint on CIFAR-10, or vgg11_bn on noise at 64 x 64."""
    if name == "resnet56":
        return cifar.trained(name), cifar.batches_of(*cifar.calibration_set(images // cifar.CLASSES))
    return torchvision.models.get_model(name, num_classes=cifar.CLASSES).eval(), noise(images, side=64)


def noise(images: int, *, side: int = 32, classes: int = cifar.CLASSES) -> cifar.Batches:
    """Seeded random images with labels of equal number, shuffled."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images)[torch.randperm(images, generator=generator)] % classes
    return cifar.batches_of(torch.randn(images, 3, side, side, generator=generator), labels)


def plain(work: Work) -> None:
    """One forward and one backward with weight gradients over the batches."""
    model, batches = work
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
    model.zero_grad(set_to_none=True)


def score(work: Work, propose: str) -> fxprune.Scores:
    """One `fxprune.score` over the batches."""
    model, batches = work
    return fxprune.score(model, batches, propose=propose, progress=False)


SIGNALS = ("reconstruction", "separability")
JOBS: dict[str, Callable[[Work], object]] = {
    "plain": plain, **{signal: partial(score, propose=signal) for signal in SIGNALS}
}  # fmt: skip


def times(work: Work, repeats: int, signal: str) -> dict[str, float]:
    """Median seconds of both jobs, the ratio of the medians, and that of the fastest runs."""
    jobs = {"plain": JOBS["plain"], "score": JOBS[signal]}
    found = interleaved({name: partial(job, work) for name, job in jobs.items()}, repeats=repeats)
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    fastest = min(found["score"]) / min(found["plain"])
    return {**medians, "ratio": medians["score"] / medians["plain"], "fastest": fastest}


def memory(name: str, images: int, repeats: int, signal: str) -> dict[str, Any]:
    """Median growth in MiB of both jobs, each in child processes, and their ratio."""
    grown: dict[str, list[float]] = {"plain": [], signal: []}
    for _ in range(repeats):
        for job, values in grown.items():
            result = child(__file__, "--child", f"{job},{name},{images}", limit=LIMIT)
            if "failed" in result:
                return result
            values.append(result["growth"])
    found = {job: statistics.median(values) for job, values in grown.items()}
    return {"plain": found["plain"], "score": found[signal], "ratio": found[signal] / found["plain"]}


def memory_child(job: str, name: str, images: int) -> dict[str, float]:
    """In a child: the growth of resident memory by one job."""
    model, batches = workload(name, images)
    with torch.inference_mode():
        model(batches[0][0][:2])
    return peak_growth(partial(JOBS[job], (model, batches)))


def measure_ratios(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Time and memory of `score` against the plain pass, for both workloads."""
    repeats = 1 if quick else 3
    data: dict[str, Any] = {}
    cases = [(name, signal) for name in WORKLOADS for signal in SIGNALS]
    for name, signal in track(cases, description="time and memory", console=CONSOLE):
        images = 200 if quick else WORKLOADS[name]
        data[f"{name}, {signal}"] = {
            "time": times(workload(name, images), repeats, signal),
            "memory": memory(name, images, repeats, signal),
        }
    columns = (
        "network, proposing signal",
        "plain pass",
        "score",
        "ratio",
        "ratio of the fastest",
        "plain, memory",
        "score, memory",
        "ratio",
    )
    rows = tuple((name, *_time_cells(found["time"]), *_memory_cells(found["memory"])) for name, found in data.items())
    note = (
        f"{' and '.join(f'{n:,}' for n in WORKLOADS.values())} images, 10 classes, batches of 100, 32 samples per "
        "class, 64 projections; both signals gather the second moments.\n\n"
        "- plain pass: forward and backward in eval mode with the gradients of all weights.\n"
        "- ratio: of the medians; ratio of the fastest: of the shortest times.\n"
        "- memory: growth of resident memory, in a process of its own."
    )
    return Table("Scoring beside one plain forward and backward pass", columns, rows, note), data


def _time_cells(found: dict[str, float]) -> tuple[str, ...]:
    return short(found["plain"]), short(found["score"]), f"{found['ratio']:.2f}", f"{found['fastest']:.2f}"


def _memory_cells(found: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in found:
        return f"failed: {found['failed']}", "", ""
    return f"{found['plain']:.0f} MiB", f"{found['score']:.0f} MiB", f"{found['ratio']:.2f}"


def growing(*, quick: bool) -> dict[str, Callable[[], Work]]:
    """What grows: the samples, the classes, the layers; from a name to what builds the work."""
    images = 200 if quick else 1000
    counts = (100, 200) if quick else (250, 500, 1000, 2000)
    networks = ("resnet20", "resnet32") if quick else ("resnet20", "resnet32", "resnet44", "resnet56")
    works: dict[str, Callable[[], Work]] = {}
    for n in counts:
        works[f"{n:,} samples, ResNet-20"] = partial(fresh, "resnet20", n)
    for k in (2, 10, 100):
        works[f"{k} classes, ResNet-20"] = partial(fresh, "resnet20", images, outputs=100, classes=k)
    for name in networks:
        works[f"{name[6:]} layers, ResNet-{name[6:]}"] = partial(fresh, name, images)
    return works


def fresh(name: str, images: int, *, outputs: int = cifar.CLASSES, classes: int = cifar.CLASSES) -> Work:
    """A CIFAR network with random weights, and noise of so many classes."""
    return cifar.build(name, outputs), noise(images, classes=classes)


def measure_growth(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Seconds of both jobs as samples, classes and layers grow; random weights and images."""
    works = growing(quick=quick)
    data = {
        name: times(make(), 1 if quick else 3, "separability")
        for name, make in track(list(works.items()), description="growth", console=CONSOLE)
    }
    rows = tuple((name, *_time_cells(found)) for name, found in data.items())
    note = (
        f"{200 if quick else 1000:,} images and 10 classes unless the row says otherwise; separability proposes; the "
        "rest is as above."
    )
    return Table(
        "Cost as samples, classes and layers grow",
        ("workload", "plain pass", "score", "ratio", "ratio of the fastest"),
        rows,
        note,
    ), data


def measure_plans(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Median and longest seconds of `Scores.plan` for torchvision's ResNet-50, over a row of alphas."""
    repeats = 20 if quick else 200
    scores = fxprune.Scores.random(torchvision.models.resnet50(), torch.randn(1, 3, 224, 224), seed=0)
    scores.plan()
    taken = [seconds(partial(scores.plan, alpha=step / repeats / 2)) for step in range(repeats)]
    data = {"median": statistics.median(taken), "longest": max(taken), "repeats": repeats}
    row = ("resnet50", short(data["median"]), short(data["longest"]), str(repeats))
    return Table("Time of scores.plan(alpha)", ("network", "median", "longest", "plans"), (row,)), data


def measure_compress(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Seconds of the whole of `compress` on torchvision's ResNet-50, in plain passes over the same images."""
    images, side = (8, 64) if quick else (64, 224)
    work = torchvision.models.resnet50(num_classes=cifar.CLASSES).eval(), noise(images, side=side)
    jobs: dict[str, Callable[[], object]] = {
        "plain": partial(plain, work),
        "compress": partial(fxprune.compress, *work, macs=0.7, progress=False),
    }
    found = {name: statistics.median(taken) for name, taken in interleaved(jobs, repeats=1 if quick else 2).items()}
    data = {**found, "ratio": found["compress"] / found["plain"]}
    row = ("resnet50", short(data["plain"]), short(data["compress"]), f"{data['ratio']:.1f}")
    note = (
        f"{images} images of noise at {side} x {side}, random weights, macs=0.7. `compress` includes the proof and "
        "sequential compensation."
    )
    return Table("compress in plain passes", ("network", "plain pass", "compress", "ratio"), (row,), note), data


def measure_breakdown(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """The parts of `score` with its defaults, for both workloads."""
    works = {name: workload(name, 200 if quick else images) for name, images in WORKLOADS.items()}
    return measured(works, plain, 1 if quick else 3)


SECTIONS: dict[str, Callable[..., tuple[Table, dict[str, Any]]]] = {
    "ratios": measure_ratios,
    "breakdown": measure_breakdown,
    "plans": measure_plans,
    "couple": measure_couple,
    "compress": measure_compress,
    "original": measure_original,
    "growth": measure_growth,
}
HEADING = "Cost of scoring"


def main() -> None:
    """Run everything, print it, and write scoring.md and scoring.json after every section."""
    arguments = parser("what scoring costs", "scoring")
    arguments.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the rest is kept")
    options: argparse.Namespace = arguments.parse_args()
    if options.child:
        job, name, images = options.child.split(",")
        CONSOLE.file.write(json.dumps(memory_child(job, name, int(images))) + "\n")
        return
    file = (options.out or DOCS) / "scoring.json"
    data: dict[str, dict[str, Any]] = {}
    if set(options.only) < set(SECTIONS) and file.exists():
        data = json.loads(file.read_text())
    for name in options.only:
        table, figures = SECTIONS[name](quick=options.quick)
        data[name] = {"table": asdict(table), "figures": figures}
        write("scoring", HEADING, tables_of(data), data, options)
    publish("scoring", HEADING, tables_of(data), data, options)


def tables_of(data: dict[str, dict[str, Any]]) -> list[Table]:
    """The tables of all sections that were measured, in their order."""
    return [Table(**data[name]["table"]) for name in SECTIONS if name in data]


if __name__ == "__main__":
    main()
