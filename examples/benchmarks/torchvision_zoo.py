"""Every classification CNN of torchvision through the whole pipeline, one process a model.

    python examples/benchmarks/torchvision_zoo.py [--quick] [--only resnet18 densenet121] [--resume]

Weights are random; BatchNorm statistics, scales, shifts and all biases are made non-trivial, so that an error in
what is removed shows in the output. The rankings are random too, seeded: what is tried here is the coupling and
the rewriting, not the choice. accuracy.py tries the choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torchvision
from measure import CONSOLE, DOCS, Table, child, millions, parser, percent, seconds, short, show, write
from rich.progress import track
from torch import Tensor, nn

import fxprune

FAMILIES = (
    "alexnet", "vgg", "resnet", "resnext", "wide_resnet", "densenet", "inception_v3", "googlenet",
    "squeezenet", "mobilenet_v", "mnasnet", "efficientnet_", "regnet_", "shufflenet_v2",
)  # fmt: skip
QUICK = ("resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1")
ALPHA = 0.1
HEADING = "torchvision's classification CNNs"
LIMIT = 900.0
Result = TypeVar("Result")


def names() -> list[str]:
    """The names of all models tried here, family by family."""
    known = torchvision.models.list_models(module=torchvision.models)
    return [name for family in FAMILIES for name in known if name.startswith(family)]


def build(name: str, *, classes: int = 1000, size: int = 224, seed: int = 0) -> nn.Module:
    """The named network in eval mode: random weights, statistics and biases that are neither 0 nor 1."""
    torch.manual_seed(seed)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options).eval()
    with torch.no_grad():
        _roughen(model, size)
    return model


def _roughen(model: nn.Module, size: int) -> None:
    """Seeded scales, shifts and biases; BatchNorm statistics near those of one random batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.normal_(0, 0.05)
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.train()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the statistics become those of the one batch
    model(torch.randn(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        _jitter(norm.eval())


def _jitter(norm: nn.BatchNorm2d) -> None:
    """Move every running mean and variance a little off."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return
    mean += 0.1 * variance.sqrt() * torch.randn_like(mean)
    variance *= torch.empty_like(variance).uniform_(0.7, 1.4)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds that it took."""
    results: list[Result] = []
    spent = seconds(lambda: results.append(call()))
    return results[0], spent


def try_model(name: str, size: int) -> dict[str, Any]:
    """Everything that the table says about one model."""
    model, example = build(name, size=size), torch.randn(2, 3, size, size)
    graph, capture_s = timed(lambda: fxprune.capture(model, example))
    groups, first_s = timed(lambda: fxprune.couple(graph))
    couple_s = statistics.median([first_s, *(seconds(lambda: fxprune.couple(graph)) for _ in range(2))])
    with torch.inference_mode():
        forward_s = statistics.median([seconds(lambda: model(example[:1])) for _ in range(4)][1:])
    plan = fxprune.Scores.random(model, example, seed=0).plan(alpha=ALPHA)
    small, rewrite_s = timed(lambda: fxprune.apply(model, plan))
    error, verify_s = timed(lambda: fxprune.verify(model, plan, small, example))
    report = fxprune.report(small)
    free = [group for group in groups if group.frozen is None]
    return {
        "model": name, "size": size, "groups": len(free), "units": sum(len(group.units) for group in free),
        "frozen": sorted({str(group.frozen) for group in groups if group.frozen is not None}),
        "share": share(model, graph, free),
        "params_before": report.params_before, "params_after": report.params_after,
        "macs_before": report.macs_before, "macs_after": report.macs_after, "error": float(error),
        "capture_s": capture_s, "couple_s": couple_s, "three_s": 3 * forward_s, "rewrite_s": rewrite_s,
        "verify_s": verify_s,
    }  # fmt: skip


def share(model: nn.Module, graph: Any, groups: Sequence[fxprune.Group]) -> float:
    """The share of the parameters that stand in layers which prunable groups narrow, on either side."""
    layers = {site.name for group in groups for site in group.sites}
    targets = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    layers |= {targets[reader] for group in groups for reader in group.consumers if reader in targets}
    touched = sum(p.numel() for layer in layers for p in parameters_at(model, layer))
    return touched / sum(p.numel() for p in model.parameters())


def parameters_at(model: nn.Module, path: str) -> list[Tensor]:
    """The parameters of the module at a path; none where the path names no module."""
    return list(dict(model.named_modules()).get(path, nn.Identity()).parameters(recurse=False))


def table(results: Sequence[dict[str, Any]]) -> Table:
    """All models as one table; a model that failed says why."""
    columns = (
        "model", "groups", "units", "parameters in them", "parameters", "after", "MACs", "after", "error",
        "capture", "couple", "three forward passes", "rewrite", "verify",
    )  # fmt: skip
    note = (
        f"alpha {ALPHA:g} on random rankings. groups, units: the prunable ones; parameters in them: the share "
        "that stands in layers which a prunable group narrows. error: verify's, in float32. couple: median of "
        "three; three forward passes: of one image."
    )
    return Table("torchvision classification CNNs", columns, tuple(cells(r) for r in results), note)


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    if "failed" in result:
        return (result["model"], *([""] * 7), f"failed: {result['failed']}", *([""] * 5))
    return (
        result["model"], str(result["groups"]), f"{result['units']:,}", percent(result["share"]),
        millions(result["params_before"]), millions(result["params_after"]),
        millions(result["macs_before"]), millions(result["macs_after"]), f"{result['error']:.1e}",
        *(short(result[f"{stage}_s"]) for stage in ("capture", "couple", "three", "rewrite", "verify")),
    )  # fmt: skip


def main() -> None:
    """Run every model in a process of its own; print and write the table."""
    options_parser = parser("every torchvision classification CNN: pruned and verified", "torchvision")
    options_parser.add_argument("--size", type=int, help="height and width of the images (default 224, quick 96)")
    options_parser.add_argument("--resume", action="store_true", help="keep the models that an earlier run wrote")
    options_parser.add_argument("--only", nargs="+", metavar="MODEL", help="only these models")
    options: argparse.Namespace = options_parser.parse_args()
    size = options.size or (96 if options.quick else 224)
    if options.child:
        warnings.filterwarnings("ignore", category=fxprune.FxpruneWarning)
        CONSOLE.file.write(json.dumps(try_model(options.child, size)) + "\n")
        return
    chosen = options.only or (QUICK if options.quick else names())
    results = finished(options) if options.resume else []
    done = {result["model"] for result in results}
    for name in track([name for name in chosen if name not in done], description="models", console=CONSOLE):
        results.append({"model": name, **child(__file__, "--child", name, "--size", str(size), limit=LIMIT)})
        CONSOLE.print("  ".join(cells(results[-1])))
        write("torchvision", HEADING, [table(results)], results, options)
    show([table(results)])


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results that an earlier run wrote."""
    page = (options.out or DOCS) / "torchvision.json"
    found: list[dict[str, Any]] = json.loads(page.read_text()) if page.exists() else []
    return [result for result in found if "failed" not in result]


if __name__ == "__main__":
    main()
