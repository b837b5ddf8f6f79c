"""The original package of the method, network-pruner, beside fxprune on ResNet-20: seconds of scoring.

    FXPRUNE_DATA=... python examples/benchmarks/original.py [--quick]

It needs `pip install network-pruner`; scoring.py includes this table in its page. Both score the same images in
one process with the same threads. The original runs the whole loader once a layer in train mode, and two forward
passes a layer and pair of classes; it works on a copy of the model, because train mode moves the BatchNorm
statistics. Where it does not finish within the limit, both get fewer images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import cifar
import torch
from measure import CONSOLE, Table, child, interleaved, parser, percent, seconds, short, show, version
from torch import Tensor, nn

import fxprune

NETWORK = "resnet20"
LIMIT = 300.0
SIZES = ((20, 10), (5, 5))  # images a class, samples a class; the next where the one before took too long
QUICK_SIZES = ((5, 5),)
ALPHA = 0.05


def compare(per_class: int, samples: int) -> dict[str, Any]:
    """Seconds of both scorings at one size, and how far the original's other steps get."""
    images, labels = cifar.calibration_set(per_class)
    model, batches = cifar.trained(NETWORK), cifar.batches_of(images, labels)
    ours = {
        f"fxprune, {projections} projections": _scoring(model, batches, samples, projections)
        for projections in (64, 128)
    }
    times = {name: statistics.median(taken) for name, taken in interleaved(ours, repeats=3).items()}
    theirs = original(copy.deepcopy(model), images, labels, samples)
    return {"images": len(labels), "samples": samples, "fxprune": times, "original": theirs}


def _scoring(model: nn.Module, batches: cifar.Batches, samples: int, projections: int) -> Callable[[], object]:
    options = {"propose": "separability", "protect": "taylor", "samples_per_class": samples, "projections": projections}
    return lambda: fxprune.score(model, batches, **options, progress=False)


def original(model: nn.Module, images: Tensor, labels: Tensor, samples: int) -> dict[str, Any]:
    """Seconds of get_metrics, the model's accuracy before and after it, and how the later steps end."""
    from Network_Pruner import FAIR_Pruner

    loader, metrics = cifar.loader_of(images, labels), []
    test = cifar.batches_of(*cifar.load_images("test", range(0, 5000, 5)), batch_size=250)
    before = cifar.accuracy(model, test)
    with quietly_elsewhere():
        spent = seconds(
            lambda: metrics.append(
                FAIR_Pruner.get_metrics(
                    model, loader, device=torch.device("cpu"), the_samplesize_for_compute_distance=samples
                )
            )
        )
        outcome = _rest(FAIR_Pruner, model, metrics[0], images[:2])
    return {"seconds": spent, "before": before, "after": cifar.accuracy(model, test), "outcome": outcome}


def _rest(package: Any, model: nn.Module, metrics: dict[str, Any], example: Tensor) -> str:
    """The steps after scoring, as far as they go: what the last one gave, or the error that ended it."""
    ratios = package.get_ratios(model, metrics, ToD_level=ALPHA)
    try:
        skeleton = package.get_skeleton(copy.deepcopy(model), ratios, example)
        _, report = package.prune(skeleton, copy.deepcopy(model), metrics, ratios, example_inputs=example)
    except RuntimeError as error:
        return f"get_ratios runs; then RuntimeError: {error}"
    return f"prunes to {report['parameters number']:,} parameters"


@contextlib.contextmanager
def quietly_elsewhere() -> Any:
    """Without standard output, in a temporary folder: the package prints, and saves files where it stands."""
    here = os.getcwd()  # noqa: PTH109
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def measure_original(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """The table at the largest size at which the original stays within the limit."""
    if importlib.util.find_spec("Network_Pruner") is None:
        failed = {"failed": "network-pruner is not installed"}
        return table(failed, [failed["failed"]]), failed
    CONSOLE.print(f"network-pruner scores {NETWORK}: minutes, {LIMIT / 60:.0f} at most for each size")
    missed: list[str] = []
    for per_class, samples in QUICK_SIZES if quick else SIZES:
        result = child(__file__, "--child", f"{per_class},{samples}", limit=LIMIT)
        if "failed" not in result:
            return table(result, missed), result
        missed.append(f"{10 * per_class:,} images, {samples} samples a class: {result['failed']}")
    return table(result, missed), result


def table(result: dict[str, Any], missed: Sequence[str]) -> Table:
    """Seconds and ratios, with what else there is to say below."""
    title = f"fxprune.score beside network-pruner {version('network-pruner')}, ResNet-20"
    columns = ("scoring", "seconds", "network-pruner / fxprune")
    if "failed" in result:
        return Table(title, columns, (), "Not measured: " + "; ".join(missed))
    theirs = result["original"]
    rows = [("network-pruner get_metrics, 128 projections", short(theirs["seconds"]), "")]
    rows += [(name, short(t), f"{theirs['seconds'] / t:.0f}") for name, t in result["fxprune"].items()]
    note = (
        f"{result['images']:,} images, {result['samples']} samples per class, 10 classes, one process, the same "
        f"number of threads. `get_metrics` ran once; `score` is the median of three. network-pruner's later steps at "
        f"ToD_level {ALPHA:g}: {theirs['outcome']} `get_metrics` runs the model in train mode, which changes its "
        f"BatchNorm statistics: its accuracy on 1,000 test images was {percent(theirs['before'])} before and "
        f"{percent(theirs['after'])} after."
    )
    return Table(title, columns, tuple(rows), note + "".join(f" Not finished: {line}." for line in missed))


def main() -> None:
    """Print the table."""
    options: argparse.Namespace = parser("network-pruner beside fxprune.score").parse_args()
    if options.child:
        per_class, samples = options.child.split(",")
        CONSOLE.file.write(json.dumps(compare(int(per_class), int(samples))) + "\n")
        return
    show([measure_original(quick=options.quick)[0]])


if __name__ == "__main__":
    main()
