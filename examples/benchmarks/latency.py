"""Latency before and after on ResNet-50 and ViT-B/16: half of the multiply-accumulates, batches of 1 and of 32.

    python examples/benchmarks/latency.py [--quick] [--threads 1] [--seconds 120] [--resume]

The weights and the scores are seeded random numbers: how long a network takes depends on its widths alone. Every
network is pruned to half of its multiply-accumulates twice, with widths that are multiples of 8 and with any widths,
and each result is timed by `fxprune.measure_latency` in turns with the original. The time of the original is therefore
taken anew beside each, and what changes between the two is the noise of the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torchvision
from measure import CONSOLE, DOCS, Table, millions, parser, percent, publish, write
from rich.progress import track
from torch import Tensor, nn

import fxprune
from fxprune.caller.typed_json import from_plain

NETWORKS = ("resnet50", "vit_b_16")
ROUND_TO = (8, 1)
BATCHES = (1, 32)
MACS = 0.5
SIDE = 224


class Tiny(nn.Module):
    """Two convolutions and a classifier, for --quick."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, H, W) to logits (batch, 10)."""
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        return self.head(x)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with seeded random weights, and two images."""
    torch.manual_seed(0)
    side = 32 if name == "tiny" else SIDE
    model = Tiny() if name == "tiny" else torchvision.models.get_model(name)
    return model.eval(), torch.randn(2, 3, side, side)


@dataclass(frozen=True, slots=True)
class Found:
    """One network at one rounding: what is left of it, and how long both take."""

    network: str
    round_to: int
    macs: tuple[int, int]
    params: tuple[int, int]
    latency: fxprune.MeasuredLatency


def measured(name: str, round_to: int, options: argparse.Namespace) -> Found:
    """Prune one network and time it."""
    model, images = build(name)
    scores = fxprune.Scores.random(model, images, seed=0)
    small = fxprune.apply(model, scores.plan(macs=MACS, round_to=round_to), scores=scores)
    limits = {"repeats": options.repeats, "seconds": options.seconds, "threads": options.threads}
    latency = fxprune.measure_latency(model, small, images, (1, 4) if options.quick else BATCHES, **limits)
    report = fxprune.report(small)
    macs, params = (report.macs_before, report.macs_after), (report.params_before, report.params_after)
    return Found(name, round_to, macs, params, latency)


def kept(options: argparse.Namespace) -> list[Found]:
    """What an earlier run has measured, with --resume."""
    path = (options.out or DOCS) / "latency.json"
    if not options.resume or not path.exists():
        return []
    return list(from_plain(tuple[Found, ...], json.loads(path.read_text(encoding="utf-8"))))


def rows(found: Found) -> Iterator[tuple[str, ...]]:
    """One row a batch size."""
    before, after = found.macs
    for pair in found.latency.batches:
        times = [f"{_ms(t.median)} ({_ms(t.low)} to {_ms(t.high)})" for t in (pair.before, pair.after)]
        last = f"{pair.speedup:.2f}", f"{pair.after.turns}, {pair.after.runs}"
        share = millions(after), percent(after / before)
        yield found.network, str(found.round_to), *share, str(pair.batch_size), *times, *last


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    "network", "round_to", "MACs left", "share", "batch", "before, ms", "after, ms", "before / after", "turns, runs",
)  # fmt: skip


def table(found: Sequence[Found], threads: int) -> Table:
    """All rows."""
    said = [
        f"{entry.network}, round_to={entry.round_to}: {'; '.join(entry.latency.explained())}."
        for entry in found
        if entry.latency.explained()
    ]
    note = (
        f"Float32, eval mode, no gradients, {threads} thread{'' if threads == 1 else 's'}. Plans: macs={MACS}, seeded "
        "random scores. Times are medians, with the quartiles in brackets. The two models run in turns; each turn "
        "begins with a call that is not timed. turns, runs: of each model, the turns and the timed calls in them. "
        "MACs: multiply-accumulate operations."
    )
    body = tuple(row for entry in found for row in rows(entry))
    return Table("Latency before and after", COLUMNS, body, "\n\n".join([note, *said]))


def main() -> None:
    """Measure, print, and write the page anew after every network."""
    options = parser("latency before and after", "latency")
    options.add_argument("--threads", type=int, default=1, help="threads for operations (default 1)")
    options.add_argument("--repeats", type=int, default=30, help="turns at most (default 30)")
    options.add_argument("--seconds", type=float, default=120.0, help="for one network at one batch size (default 120)")
    options.add_argument("--resume", action="store_true", help="measure only what latency.json does not have")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    found = kept(given)
    done = {(entry.network, entry.round_to) for entry in found}
    jobs = [(name, round_to) for name in (("tiny",) if given.quick else NETWORKS) for round_to in ROUND_TO]
    for job in track([job for job in jobs if job not in done], description="latency", console=CONSOLE):
        found.append(measured(*job, given))
        write("latency", "Latency", [table(found, given.threads)], found, given)
    publish("latency", "Latency", [table(found, given.threads)], found, given)


if __name__ == "__main__":
    main()
