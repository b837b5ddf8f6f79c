"""Architectures of ten libraries, small and with random weights: captured, pruned, verified, run as their own class.

    python examples/benchmarks/architectures.py [--only "timm/*" "*/swin*"] [--resume] [--quick]

Each runs in a process of its own, a fork of this one, with a time limit. What is tried here is the coupling and the
rewriting, not the choice of channels: accuracy.py tries the choice. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import architectures_page
import architectures_transformers as hugging_face
import torch
from architectures_libraries import LIBRARIES, Inputs, Make
from measure import CONSOLE, DOCS, forked, parser, run
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from weights import roughen

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.reporting.report import pruned_of
from fxprune.tracing.graph import captured_of

LIMIT = 90.0
ALPHA = 0.3
USUAL: dict[str, Any] = {"propose": "magnitude", "compensate": "none", "progress": False}
SAME = 1e-3  # of the output's scale, in float32: models of many layers with random weights amplify rounding


def squares(output: Any, targets: Any) -> Tensor:
    """A loss for any output: the mean of the squares of its floating tensors."""
    return torch.stack([t.float().square().mean() for t in floats(output)]).sum()


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of an output that is a tensor, a container, or an output class."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


Report = Callable[[dict[str, Any]], None]


def tried(make: Make, compress: Callable[..., nn.Module], row: dict[str, Any], report: Report) -> None:
    """Report what becomes of one architecture: whether it is pruned and verified; if it is, whether as its own class.

    `row` is what is known: the second is tried once the first is reported.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model, inputs = make()
        model.eval()
        with torch.no_grad():
            roughen(model)
            if not all(bool(t.isfinite().all()) for t in floats(run(model, inputs(2)))):
                raise ValueError("its own outputs are not finite")
    except Exception as error:  # noqa: BLE001 - the page says why
        report({"unbuilt": text_of(error)})
        return
    row = {**row, "class": type(model).__name__}
    report(row)
    stage, job = ("own_failed", partial(in_own_class, compress, row)) if is_pruned(row) else ("failed", pruned)
    try:
        row |= job(model, inputs)
    except Exception as error:  # noqa: BLE001 - the page says why
        row |= failure(stage, error)
    report(row)


def is_pruned(row: dict[str, Any]) -> bool:
    """Whether an architecture is known to be pruned and verified."""
    return "error" in row and "failed" not in row


def in_own_class(compress: Callable[..., nn.Module], row: dict[str, Any], model: nn.Module, inputs: Inputs) -> Any:
    """What a model is as its own class, narrower."""
    own = compress(model, inputs, own_class=True, unknown=row["unknown"])
    after = sum(p.numel() for p in own.parameters())
    with torch.no_grad():
        floats(run(own, inputs(3)))
    return {"own": type(own) is type(model), "own_after": after, "own_held": reasons(own)}


def pruned(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The row of a model that is pruned and verified."""
    graph = fxprune.capture(model, inputs(2))
    row: dict[str, Any] = {"unknown": "error", "rung": captured_of(graph).method}
    try:
        coupling = analyse(graph)
    except fxprune.UnsupportedOpError as error:
        row |= {"unknown": "freeze", "no_rule": text_of(error)}
        coupling = analyse(graph, unknown="freeze")
    row["share"] = share_in_reach(graph, coupling)
    small = compressed(graph, inputs, unknown=row["unknown"])
    found, record = fxprune.report(small), pruned_of(small)
    assert record is not None
    row |= {
        "error": found.error, "before": found.params_before, "after": found.params_after, "groups": len(found.groups),
        "held": reasons(small),
    }  # fmt: skip
    try:
        row["second"] = fxprune.verify(graph, record.plan, small, inputs(3)) < SAME
    except Exception as error:  # noqa: BLE001 - the page says why
        row |= failure("second", error)
    return row


def share_in_reach(graph: nn.Module, coupling: Any) -> float:
    """The share of the parameters that are in tensors which a prunable group narrows."""
    sizes = {name: parameter.numel() for name, parameter in graph.named_parameters()}
    slots = [(slot.owner, slice(start, start + size)) for slot, (start, size) in coupling.slots.items()]
    reached = {owner for owner, labels in slots if (coupling.unit_of[labels] >= 0).any()}
    return sum(size for name, size in sizes.items() if name in reached) / max(sum(sizes.values()), 1)


def reasons(small: nn.Module) -> list[tuple[str, int]]:
    """Why layers lost no channels, those with most parameters first."""
    found = fxprune.report(small)
    sizes = {layer.name: layer.params[0] for layer in found.layers}
    counts: dict[str, int] = {}
    for frozen in found.frozen:
        reason = with_short_paths(frozen.reason)
        counts[reason] = counts.get(reason, 0) + sum(sizes.get(site, 0) for site in frozen.sites)
    return sorted(((reason[:300], count) for reason, count in counts.items()), key=lambda pair: -pair[1])[:3]


def failure(stage: str, error: Exception) -> dict[str, Any]:
    """What an error says, and whether it is one of fxprune's."""
    return {stage: text_of(error), f"{stage}_foreign": not isinstance(error, fxprune.FxpruneError)}


def text_of(error: Exception) -> str:
    """An error's class and message, with paths from the package on."""
    return with_short_paths(f"{type(error).__name__}: {error}")[:2500]


def with_short_paths(text: str) -> str:
    """Text in which the paths of files begin with their package."""
    for home in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{home}/", "")
    return text


def compressed(model: nn.Module, inputs: Inputs, **options: Any) -> nn.Module:
    """`fxprune.compress` at the tolerance of this benchmark, by a loss for any output."""
    batches = [(inputs(2), torch.zeros(2))]
    return fxprune.compress(model, batches, ALPHA, loss=squares, **USUAL, **options)


def compressed_pretrained(model: Any, inputs: Inputs, **options: Any) -> nn.Module:
    """`compress_pretrained` by the loss of the model's head; of classes that have none, by the squares."""
    from fxprune.integrations.huggingface import compress_pretrained

    usual: Any = {**USUAL, **options}
    if labels := hugging_face.labels(model, inputs(2)):
        try:
            return compress_pretrained(model, [inputs(2) | labels], ALPHA, **usual)
        except fxprune.CalibrationError as error:
            if "loss" not in str(error) and "labels" not in str(error):
                raise
    return compress_pretrained(model, [(inputs(2), torch.zeros(2))], ALPHA, loss=squares, **usual)


def architectures(patterns: Sequence[str]) -> dict[str, tuple[Make, Callable[..., nn.Module]]]:
    """Every architecture of the installed libraries that the patterns name, as library/name."""
    found: dict[str, tuple[Make, Callable[..., nn.Module]]] = {}
    named = [pattern.partition("/")[0] for pattern in patterns]
    for library, members in LIBRARIES.items():
        if not any(fnmatch.fnmatch(library, name) for name in named):
            continue
        try:
            made = members()
        except ImportError as error:
            CONSOLE.print(f"{library} is left out: {error}")
            continue
        found |= {f"{library}/{name}": (make, compressed) for name, make in made.items()}
    if any(fnmatch.fnmatch("transformers", name) for name in named):
        for kind in hugging_face.architectures():
            found[f"transformers/{kind}"] = partial(hugging_face.made, kind), compressed_pretrained
    return found


def earlier(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results that an earlier run wrote."""
    page = (options.out or DOCS) / "coverage.json"
    rows: list[dict[str, Any]] = json.loads(page.read_text()) if page.exists() else []
    return {row["model"]: row for row in rows}


def ready() -> None:
    """Import once what every fork needs, and trace once; without a backward pass, whose threads a fork lacks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hugging_face.imported()
    fxprune.capture(nn.Linear(2, 2), torch.zeros(2, 2), method="values")


def main() -> None:
    """Run every architecture in a fork; write the page after every tenth, and at the end."""
    about = parser("architectures of ten libraries: pruned, verified, and run as their own class", "coverage")
    about.add_argument("--resume", action="store_true", help="run only architectures without a result")
    about.add_argument("--again", action="store_true", help="with --resume: run those that failed, too")
    about.add_argument("--only", nargs="+", metavar="PATTERN", help="library/name, such as 'timm/*'")
    about.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for each (default {LIMIT:g})")
    options = about.parse_args()
    ready()
    patterns = options.only or ["*"]
    known, results = architectures(patterns), earlier(options) if options.resume else {}
    names = [name for pattern in patterns for name in known if fnmatch.fnmatch(name, pattern)]
    if options.again:
        results = {name: row for name, row in results.items() if not architectures_page.is_bad(row)}
    stages = [lambda row: not row, lambda row: is_pruned(row) and not {"own", "own_failed"} & set(row)]
    for wanted in stages[: 1 if options.quick else 2]:
        chosen = [name for name in dict.fromkeys(names) if wanted(results.get(name, {}))]
        for index, name in enumerate(track(chosen, description="architectures", console=CONSOLE)):
            row = results.get(name, {"model": name})
            found = forked(partial(tried, *known[name], row), options.limit)
            if over := found.pop("over", ""):
                found["own_failed" if is_pruned(row) else "failed"] = over
            results[name] = row | found
            CONSOLE.print(architectures_page.line(results[name]), markup=False, highlight=False, soft_wrap=True)
            if index % 5 == 4:
                architectures_page.write(results, options.out)
        architectures_page.write(results, options.out)


if __name__ == "__main__":
    main()
