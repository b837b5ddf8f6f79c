"""Accuracy without training: CIFAR-10 networks pruned at a row of alphas, from scores that are computed once.

    FXPRUNE_DATA=... python examples/benchmarks/accuracy.py [--quick]

For each network: one pass of `fxprune.score` over 1,000 training images (100 a class), then for each alpha
a plan, the narrowed network, its proof against the masked original, and the accuracy on the test images of it and of
what compensation makes of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cifar
from measure import CONSOLE, Table, millions, parser, percent, publish, seconds
from torch import nn

import fxprune

NETWORKS = ("resnet20", "resnet56", "vgg")
ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
NOTE = (
    "Scores are computed once per network, from {images:,} training images. Nothing is trained or tuned afterwards. "
    "Accuracy is measured on {tests:,} test images.\n\n"
    "- alpha: the tolerance; full: the network before pruning.\n"
    "- share: of the full network. MACs: multiply-accumulate operations.\n"
    "- plain: accuracy right after removal; compensated: after the remaining layers were refitted in closed form, "
    "as `compress` does.\n"
    "- error: the largest difference between the narrowed network and the original with the removed units at zero, "
    "relative to the output's scale."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One network at one alpha (None: before pruning)."""

    network: str
    alpha: float | None
    params: int
    macs: int
    plain: float
    accuracy: float
    error: float
    params_share: float
    macs_share: float

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        pruned = self.alpha is not None
        return (
            self.network,
            f"{self.alpha:g}" if pruned else "full",
            millions(self.params),
            percent(self.params_share),
            millions(self.macs),
            percent(self.macs_share),
            percent(self.plain) if pruned else "",
            percent(self.accuracy),
            f"{self.error:.1e}" if pruned else "",
        )


def sweep(network: str, calibration: cifar.Batches, test: cifar.Batches, alphas: Sequence[float]) -> list[Row]:
    """The rows of one network: before pruning, then every alpha."""
    model = cifar.trained(network)
    scores: list[fxprune.Scores] = []
    spent = seconds(lambda: scores.append(fxprune.score(model, calibration)))
    CONSOLE.print(f"{network}: scored once, in {spent:.1f} s")
    rows = [prune(network, model, scores[0], alpha, calibration, test) for alpha in alphas]
    first = fxprune.report(fxprune.apply(model, scores[0].plan(alpha=alphas[0])))
    accuracy = cifar.accuracy(model, test)
    return [Row(network, None, first.params_before, first.macs_before, accuracy, accuracy, 0.0, 1.0, 1.0), *rows]


def prune(
    network: str,
    model: nn.Module,
    scores: fxprune.Scores,
    alpha: float,
    calibration: cifar.Batches,
    test: cifar.Batches,
) -> Row:
    """The row of one alpha."""
    plan = scores.plan(alpha=alpha)
    small = fxprune.apply(model, plan)
    error = fxprune.verify(model, plan, small, calibration[0][0][:2])
    repaired = fxprune.apply(model, plan, scores=scores, loader=calibration, compensate="sequential")
    report = fxprune.report(small)
    return Row(
        network,
        alpha,
        report.params_after,
        report.macs_after,
        cifar.accuracy(small, test),
        cifar.accuracy(repaired, test),
        float(error),
        report.params_after / report.params_before,
        report.macs_after / report.macs_before,
    )


def table(rows: Sequence[Row], note: str) -> Table:
    """All rows as one table."""
    columns = ("network", "alpha", "parameters", "share", "MACs", "share", "plain", "compensated", "error")
    return Table(
        "Test accuracy on CIFAR-10 without training after pruning", columns, tuple(r.cells() for r in rows), note
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over the share of MACs that is left, one line a network, every point with its alpha."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for network in dict.fromkeys(row.network for row in rows):
        points = [row for row in rows if row.network == network]
        shares, accuracies = [100 * row.macs_share for row in points], [100 * row.accuracy for row in points]
        axes.plot(shares, accuracies, marker="o", label=network)
        alphas: dict[tuple[float, float], list[str]] = {}
        for row, point in zip(points, zip(shares, accuracies, strict=True), strict=True):
            alphas.setdefault(point, []).extend([] if row.alpha is None else [f"{row.alpha:g}"])
        for point, texts in alphas.items():
            axes.annotate(", ".join(texts), point, xytext=(4, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="MACs left (% of the full network)", ylabel="test accuracy (%)")
    axes.set_title("CIFAR-10, pruned without training (alpha beside each point)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the sweep, print it, and write accuracy.md, accuracy.json and accuracy.png."""
    options: argparse.Namespace = parser("test accuracy at a row of alphas, no training", "accuracy").parse_args()
    per_class, networks = (20, NETWORKS[:1]) if options.quick else (100, NETWORKS)
    calibration = cifar.batches_of(*cifar.calibration_set(per_class))
    chosen = range(0, 5000, 10) if options.quick else None
    test = cifar.batches_of(*cifar.load_images("test", chosen), batch_size=250)
    rows = [row for network in networks for row in sweep(network, calibration, test, ALPHAS)]
    note = NOTE.format(images=10 * per_class, tests=sum(len(labels) for _, labels in test))
    page = table(rows, note)
    folder = publish("accuracy", "Accuracy without training", [page], rows, options)
    if folder is not None:
        plot(rows, folder / "accuracy.png")
        with (folder / "accuracy.md").open("a") as text:
            text.write("\n![accuracy against MACs](accuracy.png)\n")


if __name__ == "__main__":
    main()
