"""Every model that torchvision builds, and small ones of transformers: captured, coupled, rewritten and verified.

    python examples/benchmarks/zoo.py [--quick] [--only vit_b_16 raft_small BERT] [--resume]

Each runs in a process of its own. Detectors are pruned through submodule="backbone". Weights and rankings are seeded
random numbers: what is tried here is the coupling and the rewriting, not the choice. accuracy.py tries the choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import transformers_small
import torch
import torchvision
from measure import CONSOLE, DOCS, Table, child, environment, millions, parser, percent, seconds, short
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import detection, optical_flow, segmentation, video
from weights import build

import fxprune
from fxprune.coupling.couple import analyse

_MODULES = {
    "classification": torchvision.models, "segmentation": segmentation, "video": video,
    "optical flow": optical_flow, "detection": detection,
}  # fmt: skip
FAMILIES = {family: torchvision.models.list_models(module=module) for family, module in _MODULES.items()}
FAMILIES["transformers"] = list(transformers_small.MODELS)
QUICK = ("mobilenet_v3_small", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large")
Result = TypeVar("Result")
ALPHA = 0.1
LIMIT = 900.0
HEADING = "Models covered: torchvision and transformers"
SIZES = {  # height and width of the images, where a model does not take the usual ones, or would take very long
    "vit_h_14": 28, "vit_l_16": 32, "vit_l_32": 64, "regnet_y_128gf": 32, "maxvit_t": 224, "s3d": 224,
    "mvit_v1_b": 224, "mvit_v2_s": 224, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320,
}  # fmt: skip
USUAL = {
    "classification": 224,
    "segmentation": 128,
    "video": 112,
    "optical flow": 128,
    "detection": 128,
    "transformers": 32,
}
FRAMES = 16
COLUMNS = (
    "model", "input", "captured by", "groups", "units", "parameters in them", "frozen mostly by", "parameters", "after",
    "MACs", "after", "error", "forward, backward, state_dict", "capture", "couple", "three forward passes", "rewrite",
)  # fmt: skip
NOTE = (
    f"Each model is pruned at alpha {ALPHA:g} with random rankings, by group. Of a detector the backbone is pruned; "
    "forward, backward and state_dict are then those of the whole detector.\n\n"
    "- input: the size of the images.\n"
    "- captured by: the way of capture.\n"
    "- groups, units: the prunable ones. parameters in them: the share of the parameters that are in tensors which a "
    "prunable group narrows. frozen mostly by: if that share is under half, the reason that freezes most of the rest.\n"
    "- error: that of `verify`, in float32.\n"
    "- couple: the median of three. three forward passes: of two samples (of one for the large video models).\n"
    "- MACs: multiply-accumulate operations."
)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds that it took."""
    results: list[Result] = []
    spent = seconds(lambda: results.append(call()))
    return results[0], spent


def family_of(name: str) -> str:
    """The family that a model belongs to."""
    return next(family for family, names in FAMILIES.items() if name in names)


def example_of(name: str, size: int) -> Any:
    """Two samples as the model, or the backbone of a detector, takes them; one of the heavy video models."""
    generator, family = torch.Generator().manual_seed(1), family_of(name)
    if family == "transformers":
        return transformers_small.MODELS[name][1]()
    if family == "video":
        return torch.randn(1 if size > 112 else 2, 3, FRAMES, size, size, generator=generator)
    images = torch.randn(2, 2, 3, size, size, generator=generator)
    return tuple(images) if family == "optical flow" else images[0]


def try_model(name: str, size: int) -> dict[str, Any]:
    """Everything that the table says about one model."""
    example, path = example_of(name, size), "backbone" if family_of(name) == "detection" else ""
    model = build(name, size, example)
    graph, capture_s = timed(partial(fxprune.capture, model.get_submodule(path), example))
    found: dict[str, Any] = {"size": size, "rung": graph.meta["fxprune"].method, "capture_s": capture_s}
    if found["rung"] != "fx":
        found["fx_fails"] = why_not_fx(model.get_submodule(path), example)
    coupling, found["couple_s"], found["unknown"] = coupled(graph)
    with torch.inference_mode():
        found["three_s"] = 3 * statistics.median([timed(partial(run, graph.eval(), example))[1] for _ in range(4)][1:])
    found |= coverage(graph, coupling)
    unknown = "freeze" if found["unknown"] else "error"
    keys, whole = list(model.state_dict()), model if path else graph
    del model
    scores = fxprune.Scores.random(whole, example, seed=0, submodule=path, unknown=unknown)
    plan = scores.plan(alpha=ALPHA, allocate="tod-by-group")
    small, found["rewrite_s"] = timed(partial(fxprune.apply, whole, plan))
    found["error"] = fxprune.verify(whole, plan, small, example)
    del whole, graph
    report = fxprune.report(small)
    for figure in ("params_before", "params_after", "macs_before", "macs_after"):
        found[figure] = getattr(report, figure)
    jobs = {"forward": forward, "backward": backward, "state_dict": partial(round_trip, keys=keys)}
    inputs = detector_batch(size) if path else example
    return found | {name: outcome(partial(job, small, inputs)) for name, job in jobs.items()}


def tried(name: str, size: int) -> dict[str, Any]:
    """What `try_model` finds, or why it fails."""
    try:
        return try_model(name, size)
    except Exception as error:  # noqa: BLE001 - the table says why
        return {"failed": f"{type(error).__name__}: {error}"}


def why_not_fx(model: nn.Module, example: Any) -> str:
    """Why symbolic tracing does not get through a model: the error, and the line."""
    try:
        fxprune.capture(model, example, method="fx")
    except fxprune.CaptureError as error:
        line = str(error).splitlines()[1] if "\n" in str(error) else str(error)
        return re.sub(r"/\S*/(?=site-packages/)", "", line.strip().removeprefix("fx: "))
    return ""


def coupled(graph: Any) -> tuple[Any, float, str]:
    """The coupling, the seconds that it took, and the first operation without a rule, which then was frozen."""
    try:
        runs, unknown = [timed(lambda: analyse(graph)) for _ in range(3)], ""
    except fxprune.UnsupportedOpError as error:
        runs, unknown = [timed(lambda: analyse(graph, unknown="freeze"))], str(error)
    return runs[0][0], statistics.median(spent for _, spent in runs), unknown


def coverage(graph: nn.Module, coupling: Any) -> dict[str, Any]:
    """The prunable groups and units, the share of parameters in them, and what freezes most of the rest."""
    sizes = {name: parameter.numel() for name, parameter in graph.named_parameters()}
    narrowed = {owner for owner, labels in slots(coupling) if (coupling.unit_of[labels] >= 0).any()}
    share = sum(size for name, size in sizes.items() if name in narrowed) / max(sum(sizes.values()), 1)
    rest = {name: size for name, size in sizes.items() if name not in narrowed}
    frozen = {
        reason: sum(size for name, size in rest.items() if any(f"{name}.".startswith(f"{site}.") for site in sites))
        for reason, sites in coupling.frozen().items()
    }
    return {
        "groups": len(coupling.prunable), "units": sum(len(group) for group in coupling.prunable), "share": share,
        "frozen": max(frozen, key=lambda reason: frozen[reason], default="") if share < 0.5 else "",
    }  # fmt: skip


def slots(coupling: Any) -> list[tuple[str, slice]]:
    """The axes of parameters that carry labels: the parameter, and the labels."""
    return [(slot.owner, slice(start, start + size)) for slot, (start, size) in coupling.slots.items()]


def detector_batch(size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with a box each, and a mask and key points for the models that want them."""
    images = list(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)))
    box = torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * size
    points = torch.tensor([[[0.2, 0.2, 1 / size]] * 17]) * size
    masks = torch.ones(1, size, size, dtype=torch.uint8)
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": masks, "keypoints": points}
    return images, [target, target]


def run(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor, a pair of them, named ones, or a detector's batch."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def called(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating tensors of the output."""
    output = run(model, inputs)
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def forward(model: nn.Module, inputs: Any) -> bool:
    """Whether eval mode gives finite outputs."""
    with torch.no_grad():
        return all(bool(t.isfinite().all()) for t in called(model.eval(), inputs))


def backward(model: nn.Module, inputs: Any) -> bool:
    """Whether a backward pass in training mode gives finite gradients."""
    sum(t.square().mean() for t in called(model.train(), inputs)).backward()  # type: ignore[union-attr]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)


def round_trip(model: nn.Module, inputs: Any, keys: Sequence[str]) -> bool:
    """Whether the state_dict has the original's keys, and gives a twin the same outputs."""
    twin = copy.deepcopy(model.eval())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        twin.load_state_dict(model.state_dict())
        same = all(torch.equal(a, b) for a, b in zip(called(model, inputs), called(twin, inputs), strict=True))
    return same and list(model.state_dict()) == list(keys)


def outcome(job: Callable[[], bool]) -> str:
    """What became of a job: yes, no, or what it raised."""
    torch.manual_seed(0)
    try:
        return "yes" if job() else "no"
    except Exception as error:  # noqa: BLE001 - the table says which
        return type(error).__name__


def table(family: str, results: Sequence[dict[str, Any]]) -> Table:
    """The models of one family as a table; a model that failed says why."""
    return Table(family, COLUMNS, tuple(cells(r) for r in results if family_of(r["model"]) == family))


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    if "failed" in result:
        return (result["model"], *([""] * 5), f"failed: {result['failed'][:300]}", *([""] * (len(COLUMNS) - 7)))
    reason = result["frozen"] + (f" (no rule: {result['unknown'][:120]})" if result["unknown"] else "")
    return (
        result["model"], str(result["size"]), result["rung"], str(result["groups"]), f"{result['units']:,}",
        percent(result["share"]), reason, millions(result["params_before"]), millions(result["params_after"]),
        millions(result["macs_before"]), millions(result["macs_after"]), f"{result['error']:.1e}",
        ", ".join(result[job] for job in ("forward", "backward", "state_dict")),
        *(short(result[f"{stage}_s"]) for stage in ("capture", "couple", "three", "rewrite")),
    )  # fmt: skip


def summary(results: Sequence[dict[str, Any]]) -> str:
    """How many models were pruned and verified, and the median share of parameters in reach, as two sentences."""
    good = [r for r in results if "failed" not in r]
    shares = torch.tensor([r["share"] for r in good] or [0.0])
    return (
        f"{len(good)} of {len(results)} models are pruned and verified. The median share of a model's parameters that "
        f"are in prunable groups is {percent(float(shares.median()))}; it is under half in "
        f"{int((shares < 0.5).sum())} models."
    )


def write(results: Sequence[dict[str, Any]], folder: Path | None) -> None:
    """Write docs/coverage.md and docs/benchmarks/coverage.json, or both into another folder."""
    page, data = (DOCS.parent, DOCS) if folder is None else (folder, folder)
    data.mkdir(parents=True, exist_ok=True)
    tables = [table(family, results).markdown() for family in FAMILIES if any_of(family, results)]
    fails = [f"- {r['model']}: {r['fx_fails']}" for r in results if r.get("fx_fails")]
    if fails:
        tables += [
            "\n".join(["## Models that symbolic tracing cannot capture, and tracing with values can", "", *fails, ""])
        ]
    head = [f"# {HEADING}", "", summary(results), "", NOTE, "", environment(), ""]
    (page / "coverage.md").write_text("\n".join([*head, *tables]))
    (data / "coverage.json").write_text(json.dumps(results, indent=1) + "\n")


def any_of(family: str, results: Sequence[dict[str, Any]]) -> bool:
    """Whether there is a result of the family."""
    return any(family_of(result["model"]) == family for result in results)


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results that an earlier run wrote; models that failed are tried again."""
    page = (options.out or DOCS) / "coverage.json"
    found: list[dict[str, Any]] = json.loads(page.read_text()) if page.exists() else []
    return [result for result in found if "failed" not in result]


def options_of() -> argparse.Namespace:
    """The command line."""
    options = parser("models of torchvision and transformers: pruned and verified", "coverage")
    options.add_argument("--size", type=int, help="height and width of the images, for models that take any")
    options.add_argument("--resume", action="store_true", help="keep the models that an earlier run wrote")
    options.add_argument("--only", nargs="+", metavar="MODEL", help="only these models")
    options.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for each model (default {LIMIT:g})")
    return options.parse_args()


def main() -> None:
    """Run every model in a process of its own; write the page after each."""
    options = options_of()
    if options.child:
        warnings.simplefilter("ignore")
        size = SIZES.get(options.child, options.size or USUAL[family_of(options.child)])
        CONSOLE.file.write(json.dumps(tried(options.child, size)) + "\n")
        return
    known = [name for names in FAMILIES.values() for name in names]
    chosen = options.only or (QUICK if options.quick else known)
    results = finished(options) if options.resume else []
    done = {result["model"] for result in results}
    sizes = ["--size", str(options.size or 96)] if options.size or options.quick else []
    for name in track([name for name in chosen if name not in done], description="models", console=CONSOLE):
        results.append({"model": name, **child(__file__, "--child", name, *sizes, limit=options.limit)})
        CONSOLE.print("  ".join(cells(results[-1])))
        results.sort(key=lambda result: known.index(result["model"]))
        if options.out or not options.quick:
            write(results, options.out)
    CONSOLE.print(summary(results))


if __name__ == "__main__":
    main()
