"""Accuracy right after pruning, of fxprune and of its peers, at a row of budgets; and after the same short training.

    FXPRUNE_DATA=... python examples/benchmarks/oneshot.py [--quick] [--resume] [--only resnet20] [--methods fxprune]

Every method gets the same trained model and calibration data and has to come down to the same shares of the MACs,
at or just below each. MACs and parameters are counted alike for all. Each method on each model runs in a process
of its own, one after the other; the page is written after each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import cifar
from measure import CONSOLE, DOCS, Table, child, parser, percent, show, version, write
from oneshot_methods import METHODS, WHOLE, Method
from oneshot_models import (
    DIGITS,
    MODELS,
    TUNING_EPOCHS,
    TUNING_IMAGES,
    TUNING_RATE,
    Workload,
    macs,
    params,
    train_digits,
    tune,
    tuning_set,
    workload,
)
from oneshot_plot import plot
from oneshot_search import MissedError
from rich.progress import track
from torch import fx, nn

import fxprune

LIMIT = 1500.0
BUDGETS: dict[str, tuple[float, ...]] = {"pruned": (0.9, 0.7, 0.5, 0.3), "tuned": (0.7, 0.5, 0.3)}
TUNED_MODELS = ("resnet20",)
QUICK_MODELS, QUICK_BUDGETS = ("resnet20", "lstm"), (0.7,)
HEADING = "Accuracy right after pruning"
TITLES = {
    "pruned": "Accuracy after pruning to a share of the MACs, without training",
    "tuned": "The same after a short training, equal for all methods",
}
NOTES = {
    "pruned": (
        "- Columns: the budget, as a share of the MACs (multiply-accumulate operations). Cells: accuracy (share of the "
        "MACs, share of the parameters that are left).\n"
        "- Every method has to land at or below the budget, as close as it can. A ratio that all layers share comes in "
        "few steps, so it can land further below.\n"
        "- Models: resnet20, resnet56 and vgg on CIFAR-10; lstm and vit on scikit-learn's digits; speaker, an LSTM "
        "that tells speakers apart; face, the first network of a face detector; language, a LLaMA of 1.3 million "
        "parameters.\n"
        "- Calibration: 1,000 training images of CIFAR-10, 100 per class; for the digits, their training split; 240 "
        "utterances; 200 images; 128 windows of 128 tokens.\n"
        "- Measure: accuracy on 5,000 test images; for the digits, on the third that is held out; the share of 240 "
        "utterances whose speaker is found; the average precision of the original's faces; perplexity on 64 windows, "
        "of which less is better, at shares of the parameters without the embedding.\n"
        "- fxprune is `compress` with a budget. The rows that name an option of it were measured with fixed options, "
        "without a choice between plans.\n"
        "- torch-pruning {torch_pruning}: the pruning ratio is found by bisection. stream kept: layers that write to "
        "the residual stream are ignored. Otherwise it prunes the stream, too, and the padding of the ResNets' "
        "shortcuts no longer fits.\n"
        "- network-pruner {network_pruner}: the ToD level is found by bisection."
    ),
    "tuned": (
        "Cells as above. Training: {epochs} epochs over {images:,} training images of CIFAR-10, in batches of 100; SGD "
        "with momentum 0.9 and weight decay 5e-4; a learning rate of {rate:g} that falls to zero along a cosine; "
        "mirrored and shifted images; one seed."
    ),
}

HONEST = (
    "- reported: `report(small).compensation.after` of the rows fxprune above. fresh: the same on up to 1,000 samples "
    "that were neither scored nor fitted: other training images of CIFAR-10, 300 utterances, 100 images, 64 windows. "
    "The digits' networks are left out: all images that they were trained on are calibration, and on others every "
    "network is less sure.\n"
    "- plan: which of five was nearest to the original; measured is the only one where a network is too large."
)
Run = dict[str, Any]


def measured(stage: str, model: str, method: str, budgets: Sequence[float], weights: Path, *, quick: bool) -> Run:
    """In a child: a row for every budget of one method on one model, and the model's own."""
    return measured_on(workload(model, weights, quick=quick), METHODS[method], stage, budgets, quick=quick)


def measured_on(work: Workload, method: Method, stage: str, budgets: Sequence[float], *, quick: bool) -> Run:
    """A row for every budget of a method on a model, and the model's own."""
    full = {"macs": macs(work.model, work.example), "params": params(work.model)}
    full["cost"] = work.size(work.model)
    start = time.perf_counter()
    at = method.prepare(work)
    prepared = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        try:
            small, level = at(budget)
            rows.append({"budget": budget, "level": level, **result(small, work, stage, quick=quick)})
        except Exception as error:  # noqa: BLE001 - the table says why
            rows.append({"budget": budget, "failed": reason(error)})
    return {"full": full, "seconds": prepared, "rows": rows}


def result(model: nn.Module, work: Workload, stage: str, *, quick: bool) -> dict[str, Any]:
    """MACs, parameters and accuracy, after the short training where the stage has one."""
    if stage == "tuned":
        tune(model, *tuning_set(quick=quick))
    return {
        "macs": macs(model, work.example), "params": params(model), "accuracy": work.measure(model.eval()),
        "unit": work.unit, "cost": work.size(model), **judged(model, work),
    }  # fmt: skip


def judged(model: nn.Module, work: Workload) -> dict[str, Any]:
    """The error in the report of a model that fxprune made, that on fresh samples, and the plans that were compared."""
    done = fxprune.report(model).compensation if isinstance(model, fx.GraphModule) else None
    if done is None or done.after is None or not work.fresh:
        return {}
    return {"reported": done.after, "fresh": work.lost(model), "compared": dict(done.compared)}


def reason(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip()
    return text if isinstance(error, MissedError) else f"{type(error).__name__}: {text}"[:200]


def tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each stage that was run."""
    facts = {
        "torch_pruning": version("torch-pruning"), "network_pruner": version("network-pruner"),
        "epochs": TUNING_EPOCHS, "images": TUNING_IMAGES * cifar.CLASSES, "rate": TUNING_RATE,
    }  # fmt: skip
    found = []
    for stage, title in TITLES.items():
        rows = [row for model in MODELS for row in rows_of(stage, model, runs)]
        budgets = tuple(f"{budget:g}" for budget in BUDGETS[stage])
        if rows:
            found.append(Table(title, ("model", "method", *budgets), tuple(rows), NOTES[stage].format(**facts)))
    return [*found, honest(runs, MODELS, HONEST)]


def honest(runs: Sequence[Run], models: Sequence[str], note: str) -> Table:
    """The errors in the reports of fxprune's models, beside those on fresh samples."""
    rows = [
        (run["model"], f"{row['budget']:g}", f"{row['reported']:.3g}", f"{row['fresh']:.3g}",
         f"{row['reported'] / row['fresh']:.2f}", least(row["compared"]))
        for run in sorted(runs, key=lambda run: models.index(run["model"]))
        if (run["stage"], run["method"]) == ("pruned", "fxprune")
        for row in run.get("rows", ())
        if row.get("fresh")
    ]  # fmt: skip
    columns = ("model", "budget", "reported", "fresh", "ratio", "plan")
    return Table("The error in the report, and that on fresh samples", columns, tuple(rows), note)


def least(compared: dict[str, float]) -> str:
    """The plan that was taken of those that were compared."""
    return min(compared, key=lambda name: compared[name], default="measured")


def rows_of(stage: str, model: str, runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The rows of one model, in the order of METHODS."""
    chosen = {run["method"]: run for run in runs if (run["stage"], run["model"]) == (stage, model)}
    return [(model, method, *cells(stage, chosen[method])) for method in METHODS if method in chosen]


def cells(stage: str, run: Run) -> list[str]:
    """One cell a budget; where all of them fail for one reason, it is said once."""
    empty = [""] * (len(BUDGETS[stage]) - 1)
    reasons = {row.get("failed") for row in run.get("rows", ())}
    if "failed" in run or (len(reasons) == 1 and None not in reasons):
        return [f"failed: {run.get('failed') or reasons.pop()}", *empty]
    found = {row["budget"]: row for row in run["rows"]}
    if 1.0 in found:
        return [shown(found[1.0]), *empty]
    return [cell(found.get(budget), run["full"]) for budget in BUDGETS[stage]]


def cell(row: dict[str, Any] | None, full: dict[str, Any]) -> str:
    """Accuracy and what is left, or why there is none."""
    if row is None:
        return ""
    if "failed" in row:
        return str(row["failed"])
    left = row.get("cost", row["macs"]) / full.get("cost", full["macs"])
    return f"{shown(row)} ({left:.2f}, {row['params'] / full['params']:.2f})"


def shown(row: dict[str, Any]) -> str:
    """The measure of a row."""
    value: float = row["accuracy"]
    return f"{value:.1f}" if row.get("unit") == "perplexity" else percent(value)


def options_of() -> argparse.Namespace:
    """The command line."""
    options = parser("accuracy right after pruning", "oneshot")
    options.add_argument("--resume", action="store_true", help="measure only what an earlier run did not")
    options.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, help="only these models")
    options.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods, * being anything")
    options.add_argument("--stages", nargs="+", choices=TITLES, default=list(TITLES), help="without or with training")
    return options.parse_args()


def jobs_of(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(stage, model, method) of all that the command line asks for."""
    models = options.only or (QUICK_MODELS if options.quick else MODELS)
    patterns = [WHOLE, *(options.methods or "*")]
    chosen = [name for name in METHODS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [
        (stage, model, method)
        for stage in options.stages
        for model in models
        if stage == "pruned" or model in TUNED_MODELS
        for method in chosen
        if model in METHODS[method].models
    ]


def main() -> None:
    """Run every method on every model, each in a process of its own; write oneshot.md, .json and .png after each."""
    options = options_of()
    if options.child:
        warnings.simplefilter("ignore")
        job = json.loads(options.child)
        found = measured(*job, Path(options.out), quick=options.quick)
        CONSOLE.file.write(json.dumps(found) + "\n")
        return
    page = (options.out or DOCS) / "oneshot.json"
    known: list[Run] = json.loads(page.read_text()) if options.resume and page.exists() else []
    runs = {(run["stage"], run["model"], run["method"]): run for run in known}
    jobs = [(job, left) for job in jobs_of(options) if (left := missing(job, runs.get(job), quick=options.quick))]
    with tempfile.TemporaryDirectory() as weights:
        for model in {model for (_, model, _), _ in jobs} & set(DIGITS):
            train_digits(model, Path(weights))
        for job, left in track(jobs, description="methods", console=CONSOLE):
            flags = ["--quick"] if options.quick else []
            found = child(__file__, "--child", json.dumps([*job, left]), "--out", weights, *flags, limit=LIMIT)
            runs[job] = dict(zip(("stage", "model", "method"), job, strict=True)) | joined(runs.get(job), found)
            CONSOLE.print("  ".join((*job, *cells(job[0], runs[job]))))
            publish(list(runs.values()), options)
    publish(list(runs.values()), options)
    show(tables(list(runs.values())))


def missing(job: tuple[str, str, str], run: Run | None, *, quick: bool) -> list[float]:
    """The budgets of a job that an earlier run has no row for."""
    if run and "failed" in run:
        return []
    known = {row["budget"] for row in run["rows"]} if run else set()
    wanted = (1.0,) if job[2] == WHOLE else QUICK_BUDGETS if quick else BUDGETS[job[0]]
    return [budget for budget in wanted if budget not in known]


def joined(run: Run | None, found: Run) -> Run:
    """What was found, with the rows of an earlier run of the same job."""
    if run is None or "failed" in found:
        return run or found
    return found | {"rows": sorted(run["rows"] + found["rows"], key=lambda row: -row["budget"])}


def publish(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the page, the figures and the plot."""
    folder = write("oneshot", HEADING, tables(runs), runs, options)
    if folder is not None and any("rows" in run for run in runs):
        plot(runs, folder / "oneshot.png")
        with (folder / "oneshot.md").open("a") as text:
            text.write("\n![accuracy against the share that is left](oneshot.png)\n")


if __name__ == "__main__":
    main()
