"""The command `demo`, which shows the effect of pruning on data that needs no download."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.extras import DEMO_EXTRA, missing_message
from fxprune.cli.output import Output
from fxprune.cli.sweeping import ALPHAS, numbers_between
from fxprune.errors import FxpruneError

FOLDER = Path("fxprune-demo")
EPOCHS = 20


def demo(
    output: Output,
    *,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = FOLDER,
    alphas: Annotated[str, typer.Option(help="Tolerances, separated by commas.")] = ALPHAS,
    seed: Annotated[int, typer.Option(help="Seed of split, weights, batches and scores.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = EPOCHS,
) -> dict[str, Any]:
    """Train a residual network on 8 x 8 digits, score it once and prune it at a row of tolerances."""
    if message := missing_message("The demo", DEMO_EXTRA, "demo"):
        raise FxpruneError(message)
    from fxprune.cli.digits_demo import run_demo

    try:
        tolerances = numbers_between(alphas)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--alphas") from error
    rows = run_demo(out, tolerances, output, seed=seed, epochs=epochs)
    return {"out": str(out), "rows": [asdict(row) for row in rows]}
