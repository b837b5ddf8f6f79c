"""The demo: train a residual network on scikit-learn's digits, score it once, prune it at a row of alphas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.caller.files import made_folder, replacing
from fxprune.cli.evaluation import accuracy, latencies
from fxprune.cli.files import write_json
from fxprune.cli.output import Bars, Output
from fxprune.errors import FxpruneError

STAGES = (32, 64, 128)  # channels of the three stages; each but the first halves the image
BLOCKS = 2  # residual blocks a stage
BATCH = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
LATENCY_BATCH = 256


class Block(nn.Module):
    """A basic residual block (He et al. 2016) with a 1 x 1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, H, W) to (batch, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 8 x 8 grey images in ten classes.

    >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, STAGES[0], 3, padding=1, bias=False), nn.BatchNorm2d(STAGES[0]))
        self.stages = nn.Sequential()
        for before, width in zip((STAGES[0], *STAGES), STAGES, strict=False):
            first = Block(before, width, stride=1 if width == STAGES[0] else 2)
            self.stages.append(nn.Sequential(first, *(Block(width, width, stride=1) for _ in range(BLOCKS - 1))))
        self.classifier = nn.Linear(STAGES[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        y = self.stages(F.relu(self.stem(x)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return logits


@dataclass(frozen=True, slots=True)
class Digits:
    """The images as (N, 1, 8, 8) in [-1, 1] with their labels; a third is held out for the test."""

    train: TensorDataset
    test: TensorDataset


@dataclass(frozen=True, slots=True)
class Row:
    """One network; the first and the last two are None for the original, `widths` are output channels by layer.

    `plain` is the accuracy before the remaining layers are refitted, `error` the difference of that network from the
    original with the removed units at zero.
    """

    alpha: float | None
    parameters: int
    macs: int
    latency_ms: float
    accuracy: float
    widths: dict[str, int]
    plain: float | None = None
    error: float | None = None


def run_demo(out: Path, alphas: Sequence[float], output: Output, *, seed: int, epochs: int) -> list[Row]:
    """Train, score once, prune at every alpha, show the tables, write results.json and results.png to `out`.

    Returns the row of the original network, then one row per alpha.
    """
    made_folder(out, FxpruneError)
    digits = split_digits(seed)
    output.show(f"training for {epochs} epochs on {len(digits.train):,} images")
    with one_thread():
        with output.busy("training") as bars:
            model = train(digits.train, bars, epochs=epochs, seed=seed)
        with output.busy("pruning"):
            rows = measure(model, alphas, digits, seed=seed)
    output.show("", summary_table(rows), "", widths_table(rows), "")
    original, *pruned = [asdict(row) for row in rows]
    write_json(out / "results.json", {"seed": seed, "epochs": epochs, "original": original, "pruned": pruned})
    save_plot(rows, out / "results.png")
    output.wrote(out / "results.json", out / "results.png")
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: layers this small gain nothing from more, and the numbers then repeat anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def split_digits(seed: int) -> Digits:
    """The 1,797 digits, a stratified third held out."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(bunch.target, dtype=torch.long)
    indices = np.arange(len(labels))
    train, test = train_test_split(indices, test_size=1 / 3, stratify=labels, random_state=seed)
    return Digits(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]))


def train(data: TensorDataset, bars: Bars, *, epochs: int, seed: int) -> DigitsNet:
    """A DigitsNet after `epochs` of one-cycle SGD, in eval mode; the global random state does not change."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsNet()
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True, generator=order)
    optimizer = SGD(model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * len(loader))
    for _ in bars.steps(range(epochs), "epochs"):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(model: nn.Module, alphas: Sequence[float], digits: Digits, *, seed: int) -> list[Row]:
    """The row of the original, then one per alpha; the model is scored once, and nothing is trained after pruning."""
    images, test = digits.test.tensors[0], DataLoader(digits.test, batch_size=len(digits.test))
    loader = DataLoader(digits.train, batch_size=BATCH)
    scores = fxprune.score(model, loader, seed=seed)
    plans = [scores.plan(alpha) for alpha in alphas]
    plains = [fxprune.apply(model, plan) for plan in plans]
    smalls = [fxprune.apply(model, plan, scores=scores, loader=loader, compensate="sequential") for plan in plans]
    full, *times = latencies([model, *smalls], images[:LATENCY_BATCH])
    rows = []
    for plan, plain, small, latency in zip(plans, plains, smalls, times, strict=True):
        costs, error = fxprune.report(small), fxprune.verify(model, plan, plain, images[:BATCH])
        cost, hits = (costs.params_after, costs.macs_after, latency), [accuracy(m, test) for m in (small, plain)]
        rows.append(Row(plan.alpha, *cost, hits[0], widths(small), hits[1], error))
    cost = costs.params_before, costs.macs_before, full
    return [Row(None, *cost, accuracy(model, test), widths(model)), *rows]


def widths(model: nn.Module) -> dict[str, int]:
    """The output channels of every convolution, in the model's order.

    >>> widths(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)))
    {'0': 4, '2': 6}
    """
    return {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def summary_table(rows: Sequence[Row]) -> Table:
    """The costs, latency and accuracy at every alpha."""
    table = Table(
        title="Digits, pruned in one shot with no further training", title_justify="left", box=SIMPLE,
        collapse_padding=True, caption_justify="left",
        caption=f"ms: {LATENCY_BATCH} images, one thread; plain: accuracy before the remaining layers are refitted;\n"
        "error: its difference from the original with the removed units at zero",
    )  # fmt: skip
    for heading in ("alpha", "params", "%", "MACs/M", "%", "ms", "faster", "accuracy", "plain", "error"):
        table.add_column(heading, justify="right")
    full = rows[0]
    for row in rows:
        table.add_row(
            alpha_text(row), f"{row.parameters:,}", f"{row.parameters / full.parameters:.0%}", f"{row.macs / 1e6:.2f}",
            f"{row.macs / full.macs:.0%}", f"{row.latency_ms:.1f}", f"{full.latency_ms / row.latency_ms:.2f} x",
            f"{row.accuracy:.1%}", "" if row.plain is None else f"{row.plain:.1%}",
            "" if row.error is None else f"{row.error:.0e}",
        )  # fmt: skip
    return table


def widths_table(rows: Sequence[Row]) -> Table:
    """The output channels of every layer, one column per network."""
    table = Table(title="Output channels, layer by layer", title_justify="left", box=SIMPLE)
    table.add_column("layer", no_wrap=True)
    for row in rows:
        table.add_column(alpha_text(row), justify="right")
    for layer in rows[0].widths:
        table.add_row(layer, *(str(row.widths[layer]) for row in rows))
    return table


def alpha_text(row: Row) -> str:
    """The name of a row in tables and plots."""
    return "original" if row.alpha is None else f"{row.alpha:g}"


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against size on the left and the widths on the right; no display is needed."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    draw_tradeoff(left, rows)
    draw_widths(right, rows)
    with replacing(path, FxpruneError) as unfinished:
        figure.savefig(unfinished, dpi=150)


def draw_tradeoff(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy against the kept share of MACs (circles) and of parameters (squares); one colour per alpha."""
    full = rows[0]
    accuracies = [100 * row.accuracy for row in rows]
    shares = {
        "MACs": [100 * row.macs / full.macs for row in rows],
        "parameters": [100 * row.parameters / full.parameters for row in rows],
    }
    colours = colormaps["plasma"](np.linspace(0, 0.9, len(rows)))
    axes.axhline(accuracies[0], color="0.75", linewidth=1, linestyle="--", zorder=0)
    for (name, share), marker in zip(shares.items(), "os", strict=True):
        axes.plot(share, accuracies, color="0.6", linewidth=1, marker=marker, label=name, zorder=1)
        axes.scatter(share, accuracies, s=48, c=colours, marker=marker, zorder=2)
    for row, colour in zip(rows, colours, strict=True):
        label = "original" if row.alpha is None else f"alpha {alpha_text(row)}"
        axes.scatter([], [], s=80, color=[colour], marker="_", linewidth=4, label=label)
    axes.set(xlabel="share of the original (%)", ylabel="test accuracy (%)", xlim=(0, 104))
    axes.set_title("Accuracy with no further training", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def draw_widths(axes: Axes, rows: Sequence[Row]) -> None:
    """One cell per layer and alpha: the number is the width, the colour its share of the original's."""
    layers = list(rows[0].widths)
    kept = np.array([[row.widths[layer] for row in rows] for layer in layers])
    share = kept / kept[:, :1]
    image = axes.imshow(share, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (y, x), width in np.ndenumerate(kept):
        shade = "white" if share[y, x] > 0.6 else "black"
        axes.text(x, y, str(width), ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(range(len(rows)), [alpha_text(row) for row in rows])
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set_xlabel("alpha")
    axes.set_title("Output channels, layer by layer", fontsize=11)
    axes.figure.colorbar(image, ax=axes, label="share kept", fraction=0.04)
