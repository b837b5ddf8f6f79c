"""The command `sweep`: many plans from one score file, with the costs and the accuracy of each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.caller.batches import first_inputs
from fxprune.caller.example import batch_length, trim
from fxprune.caller.files import made_folder
from fxprune.caller.source_lines import warn
from fxprune.cli.evaluation import latencies
from fxprune.cli.extras import PLOT_EXTRA, missing_message
from fxprune.cli.files import write_json
from fxprune.cli.input_options import DataOptions, File, ModelOptions, SweepEvalOptions
from fxprune.cli.named_objects import object_of
from fxprune.cli.output import Output
from fxprune.cli.pareto import Row, plot, table, with_front
from fxprune.cli.pruning import compensated, planned
from fxprune.cli.pruning_options import Allocation, Level, LimitOptions, Run
from fxprune.errors import FxpruneError, PlanError
from fxprune.planning.plan import Plan
from fxprune.scoring.scores import Scores

ALPHAS = "0,0.02,0.05,0.1,0.2,0.3"
FOLDER = Path("fxprune-sweep")
Points = list[tuple[str, float]]


def sweep(
    model: ModelOptions,
    data: DataOptions,
    limits: LimitOptions,
    evaluation: SweepEvalOptions,
    output: Output,
    *,
    scores: Annotated[Path, File(help="A file that `fxprune score` wrote for this model.")],
    alphas: Annotated[
        str | None, typer.Option(help=f"Tolerances, separated by commas; {ALPHAS} where no budget is given either.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Shares of the parameters to keep, such as 0.8,0.6,0.4.")] = None,
    macs: Annotated[str | None, typer.Option(help="Shares of the multiply-accumulates to keep.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Shares of the estimated time to keep; needs scores taken with --times.")
    ] = None,
    allocate: Allocation = "tod",
    compensate: Annotated[
        str | None,
        Level(help="How the removed units are made up for; by default sequential with --data, and ridge without."),
    ] = None,
    run: Run = None,
    time_batch: Annotated[int, typer.Option(min=0, help="Samples a batch that is timed; 0 takes no times.")] = 32,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.json and results.png.")] = FOLDER,
) -> dict[str, Any]:
    """Prune at many tolerances or budgets from one score file: a table, a plot, and the Pareto front.

    The front holds the models that no other beats: as accurate, with as few MACs and as fast, and better in one.
    """
    points = _points(alphas, params=params, macs=macs, latency=latency)
    if message := missing_message("The plot of fxprune sweep", PLOT_EXTRA, "demo"):
        raise FxpruneError(message)
    known = Scores.load(scores)
    plans = _plans(known, points, allocate, limits)
    built = model.build(output)
    loader = data.loader(built, output, model.seed)
    held = evaluation.held_out(data, built, output, model.seed)
    level = compensate or ("ridge" if loader is None else "sequential")
    functions = {"unpack": data.unpacking(), "run": object_of(run, "--run"), "seed": model.seed}
    made_folder(out, FxpruneError)
    smalls, values = [], []
    with output.busy("sweeping") as bars:
        original = held.before(built.model, bars)
        for _, plan in bars.steps(plans, "plans"):
            watched = None if loader is None else bars.over(loader, "calibrating")
            small = compensated(built.model, plan, level=level, scores=known, loader=watched, verify=True, **functions)
            smalls.append(small)
            values.append(held.value(small, bars))
    times: list[float | None] = [None] * (len(smalls) + 1)
    timed = 0
    if time_batch:
        batch = trim(first_inputs(built.model, held.loader, functions["unpack"]), samples=time_batch)
        timed = batch_length(batch)
        with output.busy("timing"):
            times = list(latencies([built.model, *smalls], batch))
    reports = [fxprune.report(small) for small in smalls]
    rows = [Row("original", None, reports[0].params_before, reports[0].macs_before, original, times[0])]
    for (name, plan), found, value, milliseconds in zip(plans, reports, values, times[1:], strict=True):
        rows.append(Row(name, plan.alpha, found.params_after, found.macs_after, value, milliseconds))
    rows = with_front(rows)
    content = {"compensate": level, "metric": held.name, "time_batch": timed, "rows": [asdict(row) for row in rows]}
    write_json(out / "results.json", content)
    plot(rows, out / "results.png", held.name)
    output.show(table(rows, held.name, timed))
    output.wrote(out / "results.json", out / "results.png")
    return content | {"out": str(out)}


def _points(alphas: str | None, **budgets: str | None) -> Points:
    """The levels to plan for, the mildest first: the tolerances, rising, and the shares of each budget, falling."""
    asked = {"alpha": alphas, **budgets}
    if not any(asked.values()):
        asked["alpha"] = ALPHAS
    try:
        numbers = {name: numbers_between(text, name) for name, text in asked.items() if text}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--alphas / --params / --macs / --latency") from None
    return [(name, value) for name, found in numbers.items() for value in sorted(found, reverse=name != "alpha")]


def numbers_between(text: str, name: str = "alpha") -> tuple[float, ...]:
    """The distinct numbers from 0 to 1 in `text`, rising; raises ValueError for any other text.

    >>> numbers_between("0.1, 0,0.02")
    (0.0, 0.02, 0.1)
    """
    found = set()
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"{part.strip()!r} is no number; write {name} as 0.02,0.05,0.1") from None
        if not 0 <= number <= 1:
            raise ValueError(f"{name} {number:g} is outside 0 to 1")
        found.add(number)
    return tuple(sorted(found))


def _plans(scores: Scores, points: Points, allocate: str, limits: LimitOptions) -> list[tuple[str, Plan]]:
    """A named plan for each point; a budget that cannot be reached is left out with a warning.

    Raises PlanError where there is none.
    """
    plans = []
    for kind, value in points:
        try:
            plans.append((f"{kind} {value:g}", planned(scores, {kind: value}, allocate=allocate, limits=limits)))
        except PlanError as error:
            last = error
            warn(f"left out: {error}")
    if points and not plans:
        raise last
    return plans
