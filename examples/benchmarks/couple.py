"""How long `couple` takes on every convolutional network of torchvision, in forward passes of one image."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
import torchvision
from measure import CONSOLE, Table, interleaved, short
from rich.progress import track
from weights import build

import fxprune
from fxprune.coupling.couple import analyse

SIDE = 224
TRANSFORMERS = ("vit_", "swin_", "maxvit_")
QUICK = ("resnet18", "squeezenet1_1")
LONG = 1.0  # seconds that are never too much
COLUMNS = ("network", "couple", "three forward passes", "couple / passes")


def networks() -> list[str]:
    """The classifiers of torchvision that are no transformers."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(TRANSFORMERS)]


def timed(name: str) -> dict[str, float]:
    """Median seconds of coupling and of three forward passes of one image in eval mode, in turns."""
    image = torch.randn(1, 3, SIDE, SIDE)
    model = build(name, SIDE, image)
    graph = fxprune.capture(model, image)
    with torch.no_grad():
        taken = interleaved({"couple": partial(analyse, graph), "pass": partial(model, image)}, repeats=3)
    return {"couple": statistics.median(taken["couple"]), "passes": 3 * statistics.median(taken["pass"])}


def measure_couple(*, quick: bool) -> tuple[Table, dict[str, Any]]:
    """`couple` beside three forward passes, network by network."""
    found = {name: timed(name) for name in track(QUICK if quick else networks(), description="couple", console=CONSOLE)}
    rows = tuple(
        (name, short(t["couple"]), short(t["passes"]), f"{t['couple'] / t['passes']:.2f}") for name, t in found.items()
    )
    over = [name for name, t in found.items() if t["couple"] > max(LONG, t["passes"])]
    note = (
        f"Medians of three, in turns; forward passes of one image of {SIDE} x {SIDE}, in eval mode. `couple` takes "
        f"longer than both three passes and one second on {len(over)} of {len(found)} networks{': ' * bool(over)}"
        f"{', '.join(over)}. The longest time is {short(max(t['couple'] for t in found.values()))}."
    )
    return Table("couple beside forward passes", COLUMNS, rows, note), {"networks": found, "over": over}
