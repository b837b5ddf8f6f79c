"""The ways of capture, each tried on a member of every family of torchvision's models and on those of transformers.

    python examples/benchmarks/rungs.py [--quick] [--only swin_t BERT] [--resume]

`capture` takes the first way that works. Here each is taken by its name, and the graph compared with the model.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers_small
from measure import CONSOLE, DOCS, Table, child, parser, run, show, write
from peers import floats, member
from rich.progress import track
from weights import MEMBERS

import fxprune
from fxprune.tracing.capture import RUNGS

LIMIT = 600.0
NAMES = (*MEMBERS, "mvit_v2_s", *transformers_small.MODELS)
QUICK = ("resnet18", "swin_t", "BERT")
NOTE = (
    "Each graph was captured in that way alone, on two small samples. Cells: the largest difference between the "
    "outputs of graph and model, as a share of the largest output. Of detectors, only the backbone was captured."
)


def tried(rung: str, name: str) -> dict[str, Any]:
    """How far the outputs of the graph that one way gives are from the model's; or why there is no graph."""
    whole, example, path = member(name)
    model = whole.get_submodule(path).eval()
    try:
        graph = fxprune.capture(model, example, method=rung)
    except Exception as error:  # noqa: BLE001 - the table says why
        return {"failed": reason(error)}
    with torch.no_grad():
        wanted, found = (floats(run(each.eval(), example)) for each in (model, graph))
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True)]
    return {"error": max(errors)}


def reason(error: Exception) -> str:
    """The line of an error that names this way's reason, with paths from the package on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if isinstance(error, fxprune.CaptureError) and len(lines) > 1 else lines[0]
    return re.sub(r"/\S*/(?=site-packages/)", "", re.sub(r"^(fx|values): ", "", line))


def table(results: Sequence[dict[str, Any]]) -> Table:
    """All models, and how many each way takes."""
    rows = tuple((r["model"], *(cell(r[rung]) for rung in RUNGS)) for r in results)
    counts = [f"{rung} captures {sum('failed' not in r[rung] for r in results)} of {len(results)}" for rung in RUNGS]
    return Table("Each way alone", ("model", *RUNGS), rows, f"{', '.join(counts)}. {NOTE}")


def cell(found: dict[str, Any]) -> str:
    """What became of one way on one model."""
    return "no graph" if "failed" in found else f"{found['error']:.0e}"


def refused(rung: str, results: Sequence[dict[str, Any]]) -> Table:
    """The models that a way does not take, with its reason."""
    rows = tuple((r["model"], r[rung]["failed"]) for r in results if "failed" in r[rung])
    return Table(f"Where {rung} gives no graph", ("model", "reason"), rows or (("none", ""),))


def main() -> None:
    """Try every way on every model, each in a process of its own; write the page after each model."""
    options_parser = parser("each way of capture on families of models", "rungs")
    options_parser.add_argument("--resume", action="store_true", help="keep earlier results, but of those in --only")
    options_parser.add_argument("--only", nargs="+", metavar="MODEL", choices=NAMES, help="only these models")
    options: argparse.Namespace = options_parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        CONSOLE.file.write(json.dumps(tried(*options.child.split(","))) + "\n")
        return
    page = (options.out or DOCS) / "rungs.json"
    results = json.loads(page.read_text()) if options.resume and page.exists() else []
    results = [result for result in results if result["model"] not in (options.only or ())]
    done = {result["model"] for result in results}
    chosen = [name for name in options.only or (QUICK if options.quick else NAMES) if name not in done]
    tables: list[Table] = []
    for name in track(chosen, description="models", console=CONSOLE):
        found = {rung: child(__file__, "--child", f"{rung},{name}", limit=LIMIT) for rung in RUNGS}
        CONSOLE.print(name, *(found[rung].get("failed", cell(found[rung])) for rung in RUNGS), sep="  ")
        results = sorted([*results, {"model": name, **found}], key=lambda result: NAMES.index(result["model"]))
        tables = [table(results), *(refused(rung, results) for rung in RUNGS)]
        write("rungs", "Ways of capture", tables, results, options)
    show(tables)


if __name__ == "__main__":
    main()
