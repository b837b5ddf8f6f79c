"""torch-pruning beside fxprune over the models of torchvision: how many each handles, how many are right, how long.

Analysis is the graph and the groups of channels in it: `capture` and `couple`, and the DependencyGraph of torch-pruning
with its groups. It is timed first, in a fresh process. The proof that fxprune's graph is the model, of which
torch-pruning has no counterpart, is timed by itself.

    python examples/benchmarks/peers.py [--quick] [--only resnet18 swin_t] [--resume]

Both get the same model with the same seeded weights. torch-pruning is called as its documentation has it: an example,
group magnitude as importance, a third of each group, the output layer ignored, nothing that is specific to a model.
Its result is right if it equals the original with zeros in the place of the input channels that it says it removed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import CONSOLE, DOCS, Table, child, parser, run, short, show, timed, version, write
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from weights import MEMBERS, SIZES, USUAL, build, example_of, family_of

import fxprune

LIMIT = 120.0
RATIO = 1 / 3
NOTE = (
    "\n\n- analysis: of fxprune, capture without its proof, and coupling; of torch-pruning, the dependency graph and "
    "all of its groups.\n- its proof: the additional time in which capture runs the model and its graph on other "
    "batches.\n- all: analysis, choice and pruning; of fxprune, also measuring the MACs (multiply-accumulate "
    "operations).\n- right: equal to the original with the removed input channels at zero, within 1e-4 of the "
    "output's scale."
)
QUICK = ("resnet18", "shufflenet_v2_x0_5", "swin_t")


def ours(model: nn.Module, example: Any, path: str) -> dict[str, Any]:
    """Seconds of analysis, of proof and of all with rewriting, verify's error, and the parameters that are left."""
    part = model.get_submodule(path)
    graph, capturing = timed(partial(fxprune.capture, part, example, prove=False))
    _, coupling = timed(partial(fxprune.couple, graph))
    whole = model if path else graph

    def pruned() -> tuple[fxprune.Plan, nn.Module]:
        plan = fxprune.Scores.random(whole, example, submodule=path).plan(alpha=0.1, allocate="tod-by-group")
        return plan, fxprune.apply(whole, plan)

    (plan, small), rewriting = timed(pruned)
    again, proven = (timed(partial(fxprune.capture, part, example, prove=prove))[1] for prove in (False, True))
    return {
        "analysis": capturing + coupling,
        "proof": proven - again,
        "seconds": rewriting + (0 if path else capturing),
        "error": fxprune.verify(whole, plan, small, example),
        "after": sum(p.numel() for p in small.parameters()),
    }


def theirs(model: nn.Module, example: Any, path: str) -> dict[str, Any]:
    """The same of torch-pruning; its error is against the original whose removed input channels are zeroed."""
    import torch_pruning as tp

    part, masked = model.get_submodule(path), copy.deepcopy(model.get_submodule(path)).eval()
    last = [module for module in part.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))][-1:]
    readings: list[tuple[str, list[int]]] = []
    _, analysis = timed(lambda: list(tp.DependencyGraph().build_dependency(part, example).get_all_groups()))

    def pruned() -> None:
        pruner = tp.pruner.BasePruner(
            part, example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=RATIO, ignored_layers=last
        )
        names = {module: name for name, module in part.named_modules()}
        for group in pruner.step(interactive=True):
            for dependency, channels in group:
                if dependency.handler.__name__ == "prune_in_channels":
                    readings.append((names.get(dependency.target.module, ""), list(channels)))
            group.prune()

    _, spent = timed(pruned)
    zero_inputs(masked, readings)
    with torch.no_grad():
        wanted, found = (floats(run(m.eval(), example)) for m in (masked, part))
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return {"failed": "the outputs have other shapes than the original's"}
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, found, strict=True))
    after = sum(p.numel() for p in model.parameters())
    return {"analysis": analysis, "seconds": spent, "error": error, "after": after}


def zero_inputs(model: nn.Module, readings: Sequence[tuple[str, list[int]]]) -> None:
    """Zero what the layers of weights read of removed input channels; indices count what is left at the time."""
    left: dict[str, list[int]] = {}
    for name, channels in readings:
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            groups, width = getattr(layer, "groups", 1), layer.weight.shape[1]
            if groups > 1 and width == 1:
                continue  # depthwise: what it gives is read, and zeroed, further on
            present = left.setdefault(name, list(range(groups * width)))
            gone = [present[channel] for channel in channels]
            left[name] = [channel for channel in present if channel not in set(gone)]
            weight = layer.weight.data.unflatten(0, (groups, -1))
            for channel in gone:
                weight[channel // width, :, channel % width] = 0


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of an output."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


TOOLS = {"fxprune": ours, "torch-pruning": theirs}


def member(name: str) -> tuple[nn.Module, Any, str]:
    """A model at a small size of images, an example, and the path of the part that takes it."""
    size = SIZES.get(name, min(USUAL[family_of(name)], 128))
    example, path = example_of(name, size), "backbone" if family_of(name) == "detection" else ""
    return build(name, size, example), example, path


def tried(tool: str, name: str) -> dict[str, Any]:
    """What a tool makes of a model, or why it fails."""
    model, example, path = member(name)
    before = sum(p.numel() for p in model.parameters())
    try:
        return {"before": before, **TOOLS[tool](model, example, path)}
    except Exception as error:  # noqa: BLE001 - the table says why
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    row = [result["model"]]
    for tool in TOOLS:
        found = result[tool]
        if "failed" in found:
            row += [*[""] * (4 if tool == "fxprune" else 3), f"failed: {found['failed'][:100]}"]
        else:
            times = ("analysis", "proof", "seconds") if tool == "fxprune" else ("analysis", "seconds")
            row += [short(found[time]) for time in times]
            row += [f"{found['after'] / found['before']:.0%}", verdict(found)]
    return tuple(row)


def verdict(found: dict[str, Any]) -> str:
    """Whether a result equals the original with what was removed at zero."""
    return f"right ({found['error']:.0e})" if found["error"] < 1e-4 else f"other outputs ({found['error']:.0e})"


def compared(results: Sequence[dict[str, Any]], what: str) -> str:
    """How long fxprune takes beside torch-pruning, over the models that both handle."""
    ratios = {r["model"]: r["fxprune"][what] / r["torch-pruning"][what] for r in results}
    if not ratios:
        return ""
    most = max(ratios, key=lambda model: ratios[model])
    name = {"analysis": "analysis", "seconds": "analysis and pruning"}[what]
    return (
        f"The {name} of fxprune takes {statistics.median(ratios.values()):.2f} times as long (median; "
        f"at most {ratios[most]:.2f}, {most})."
    )


def table(results: Sequence[dict[str, Any]]) -> Table:
    """All models, and how many each tool handles."""
    columns = ["model"]
    for tool in TOOLS:
        columns += [f"{tool}: analysis", *(["its proof"] * (tool == "fxprune")), "all", "parameters left", "result"]
    counts = []
    for tool in TOOLS:
        done = [r[tool] for r in results if "failed" not in r[tool]]
        right = sum(found["error"] < 1e-4 for found in done)
        counts.append(f"{tool} handles {len(done)} of {len(results)} models; {right} of its results are right.")
    both = [r for r in results if all("failed" not in r[tool] for tool in TOOLS)]
    note = " ".join([*counts, *(compared(both, what) for what in ("analysis", "seconds"))]) + NOTE
    title = f"fxprune and torch-pruning {version('torch-pruning')}"
    return Table(title, tuple(columns), tuple(cells(r) for r in results), note)


def main() -> None:
    """Run both tools on every model, each in a process of its own; write the page after each model."""
    options_parser = parser("torch-pruning beside fxprune", "peers")
    options_parser.add_argument("--resume", action="store_true", help="keep earlier results, but of those in --only")
    options_parser.add_argument("--only", nargs="+", metavar="MODEL", help="only these models")
    options: argparse.Namespace = options_parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        CONSOLE.file.write(json.dumps(tried(*options.child.split(","))) + "\n")
        return
    page = (options.out or DOCS) / "peers.json"
    results = json.loads(page.read_text()) if options.resume and page.exists() else []
    results = [result for result in results if result["model"] not in (options.only or ())]
    done = {result["model"] for result in results}
    chosen = [n for n in options.only or (QUICK if options.quick else MEMBERS) if n not in done]
    for name in track(chosen, description="models", console=CONSOLE):
        found = {tool: child(__file__, "--child", f"{tool},{name}", limit=LIMIT) for tool in TOOLS}
        CONSOLE.print("  ".join(cells({"model": name, **found})))
        results = sorted([*results, {"model": name, **found}], key=lambda result: MEMBERS.index(result["model"]))
        write("peers", "fxprune and torch-pruning on models of torchvision", [table(results)], results, options)
    show([table(results)])


if __name__ == "__main__":
    main()
