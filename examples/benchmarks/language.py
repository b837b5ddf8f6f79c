"""Perplexity of two small language models after pruning to shares of their parameters, by fxprune and its peers.

    FXPRUNE_DATA=... python examples/benchmarks/language.py [--quick] [--resume] [--only prose] [--methods fxprune]

Every method has the same 128 windows of training text; the perplexity is that of text that was neither trained on nor
calibrated with. Rows are measured one after the other, and the page is written after each.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import oneshot_language as language
from language_text import docstrings
from measure import CONSOLE, DOCS, Table, parser, write
from oneshot import Run, cells, honest, joined, measured_on, missing
from oneshot_methods import METHODS, WHOLE, Method
from oneshot_models import Workload, of_task
from oneshot_real import NextToken, Task
from oneshot_real import language as prose
from oneshot_search import AtBudget
from rich.progress import track
from torch import nn

from fxprune.integrations.huggingface import compress_pretrained

MODELS: dict[str, Callable[[], Task]] = {"prose": prose, "docstrings": docstrings}
OTHERS = ("magnitude, uniform", "Wanda-sp, uniform", "FLAP", "ShortGPT")


def plain(work: Workload, *, blocks: bool) -> AtBudget:
    """A checkpoint like any other, which may have fewer blocks."""
    told = [{"input_ids": words, "labels": words} for words, _ in work.calibration]

    def at(budget: float) -> tuple[nn.Module, None]:
        small = compress_pretrained(
            work.model.model, told, **work.budget(budget), plain=True, blocks=blocks, progress=False
        )
        return NextToken(small).eval(), None

    return at


ROWS: dict[str, Method] = {
    **{name: METHODS[name] for name in (WHOLE, "fxprune")},
    "fxprune, plain": Method(partial(plain, blocks=False)),
    "fxprune, plain, whole blocks too": Method(partial(plain, blocks=True)),
    **{name: METHODS[name] for name in OTHERS},
    "LLM-Pruner-style Taylor, uniform": Method(language.ranked("taylor", "uniform", "none")),
    "SliceGPT-like": Method(partial(language.slice_gpt, shared=False)),
    "SliceGPT-like, one rotation": Method(partial(language.slice_gpt, shared=True)),
}
HEADING = "Language models right after pruning"
TITLE = "Perplexity at shares of the parameters without the embedding, without training"
NOTE = (
    "- Columns: the budget, as a share of the parameters without the embedding. Cells: perplexity, of which less is "
    "better (share of these parameters, share of all parameters that are left).\n"
    "- Models: prose, a LLaMA of 6 layers and 1.3 million parameters; docstrings, a Qwen2 of 4 layers and "
    "1.2 million parameters, which the script trains on the docstrings of Python's standard library.\n"
    "- Calibration, for all methods: 128 windows of 128 tokens of the text that was trained on. Measure: 64 windows of "
    "text that was not: for docstrings, of other files.\n"
    "- fxprune is `compress` with a budget. plain is `compress_pretrained(plain=True)`: one width for all layers, as "
    "the configuration can say it, and no new biases; whole blocks too: the same with `blocks=True`.\n"
    "- The other rows follow their papers on the units that fxprune finds prunable: magnitude, Wanda-sp, FLAP with its "
    "biases, and the first-order importance of LLM-Pruner, summed over each unit. ShortGPT drops the nearest number of "
    "blocks.\n"
    "- SliceGPT rotates the residual stream to its principal components and drops the last. Its matrices between the "
    "rotations of two layers count as parameters; one rotation for all layers needs none."
)
HONEST = (
    "- reported: `report(small).compensation.after` of the rows fxprune above, in nats a token. fresh: the same on the "
    "64 windows of the measure, of which nothing was scored or fitted.\n"
    "- plan: which of five was nearest to the original."
)


def tables(runs: Sequence[Run]) -> list[Table]:
    """The table of all runs, in the order of the methods, and that of the reported errors."""
    found = {(run["model"], run["method"]): run for run in runs}
    rows = [
        (model, method, *cells("pruned", found[model, method]))
        for model in MODELS
        for method in ROWS
        if (model, method) in found
    ]
    columns = ("model", "method", "0.9", "0.7", "0.5", "0.3")
    return [Table(TITLE, columns, tuple(rows), NOTE), honest(runs, list(MODELS), HONEST)]


def options_of() -> argparse.Namespace:
    """The command line."""
    options = parser("perplexity right after pruning", "language")
    options.add_argument("--resume", action="store_true", help="measure only what an earlier run did not")
    options.add_argument("--only", nargs="+", metavar="MODEL", choices=MODELS, help="only these models")
    options.add_argument("--methods", nargs="+", metavar="NAME", default=["*"], help="only these, * being anything")
    return options.parse_args()


def main() -> None:
    """Run every method on every model; write language.md and .json after each."""
    options = options_of()
    warnings.simplefilter("ignore")
    page = (options.out or DOCS) / "language.json"
    known: list[Run] = json.loads(page.read_text()) if options.resume and page.exists() else []
    runs = {(run["stage"], run["model"], run["method"]): run for run in known}
    chosen = [name for name in ROWS if any(fnmatchcase(name, p) for p in (WHOLE, *options.methods))]
    for model in options.only or (["prose"] if options.quick else MODELS):
        work: Workload = of_task(MODELS[model]())
        for method in track(chosen, description=model, console=CONSOLE):
            job = ("pruned", model, method)
            if left := missing(job, runs.get(job), quick=options.quick):
                found = measured_on(work, ROWS[method], "pruned", left, quick=options.quick)
                runs[job] = dict(zip(("stage", "model", "method"), job, strict=True)) | joined(runs.get(job), found)
                CONSOLE.print("  ".join((model, method, *cells("pruned", runs[job]))))
                write("language", HEADING, tables(list(runs.values())), list(runs.values()), options)


if __name__ == "__main__":
    main()
