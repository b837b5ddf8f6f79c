"""Models without numbers: what it costs to analyse large ones on the meta device, and to narrow their checkpoints.

    python examples/benchmarks/shapes.py [--quick]

Every model is built on the meta device in a child process of its own, and captured, coupled, scored at random and
planned for half of its parameters; then the plan is applied. The time is that of the calls, without imports and
without building the model; the memory is the most that was resident in the child's whole life, torch and all.

The checkpoint is one of the first layers of the LLaMA-7B-shaped model in bfloat16, as sparse files: zeros that take no
room. The growth of resident memory is that of `rewrite_checkpoint` alone.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from measure import CONSOLE, Table, child, millions, parser, peak_growth, publish, seconds, short
from torch import nn

import fxprune

Made = tuple[nn.Module, Any]
HEADING = "Large models without numbers"
LIMIT = 900.0
SHARDS = 3


def llama(layers: int = 32) -> Made:
    """The shape of LLaMA-7B, and sixteen words."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=layers,
        num_attention_heads=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}


def image_model(name: str, size: int = 224) -> Made:
    """A model of torchvision, and one image."""
    return torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, size, size)


MODELS: dict[str, Callable[[], Made]] = {
    "LLaMA-7B-shaped, 16 words": llama,
    "LLaMA-7B-shaped, 2 layers": partial(llama, 2),
    "vit_h_14": partial(image_model, "vit_h_14"),
    "convnext_large": partial(image_model, "convnext_large"),
    "resnet152": partial(image_model, "resnet152"),
}
QUICK = ("LLaMA-7B-shaped, 2 layers",)


def built(name: str) -> Made:
    """A model on the meta device, and its example."""
    with torch.device("meta"):
        return MODELS[name]()


def analysis(name: str) -> dict[str, float]:
    """In a child: the seconds of each stage, the parameters and MACs, and the peak of resident memory."""
    model, example = built(name)
    kept: dict[str, Any] = {}
    stages: dict[str, Callable[[], Any]] = {
        "capture": lambda: fxprune.capture(model, example),
        "couple": lambda: fxprune.couple(kept["capture"]),
        "scores": lambda: fxprune.Scores.random(kept["capture"], example),
        "plan": lambda: kept["scores"].plan(params=0.5),
    }

    def run(stage: str) -> None:
        kept[stage] = stages[stage]()

    times = {stage: seconds(partial(run, stage)) for stage in stages}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times["apply"] = seconds(lambda: fxprune.apply(model, kept["plan"]))
    report = fxprune.report(fxprune.apply(model, kept["plan"]))
    return times | {
        "peak": peak,
        "params": report.params_before,
        "left": report.params_after,
        "macs": report.macs_before,
    }


def write_sparse(model: nn.Module, folder: Path) -> int:
    """A checkpoint of zeros in bfloat16; returns its bytes."""
    tensors = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    places = {name: f"model-{i % SHARDS + 1:05d}-of-{SHARDS:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        header, end = {}, 0
        for name in (name for name, place in places.items() if place == file):
            start, end = end, end + 2 * math.prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(2 * math.prod(shape) for shape in tensors.values())


def rewriting(name: str) -> dict[str, float]:
    """In a child: the seconds, the bytes and the growth of memory of narrowing a checkpoint to half the parameters."""
    model, example = built(name)
    plan = fxprune.Scores.random(model, example).plan(params=0.5)
    largest = max(2 * parameter.numel() for parameter in model.parameters())
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "source").mkdir()
        size = write_sparse(model, folder / "source")
        taken: dict[str, float] = {}

        def job() -> None:
            taken["seconds"] = seconds(
                lambda: fxprune.rewrite_checkpoint(folder / "source", plan, folder / "small", model=model)
            )

        return {"bytes": size, "largest": largest, **peak_growth(job), **taken}
    finally:
        shutil.rmtree(folder)


def measure(*, quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Both tables."""
    data: dict[str, Any] = {"analysis": {}, "rewriting": {}}
    rows = []
    for name in QUICK if quick else MODELS:
        found = data["analysis"][name] = child(__file__, "--child", f"analysis,{name}", limit=LIMIT)
        rows.append((name, *_cells(found)))
    columns = ("model", "parameters", "capture", "couple", "scores", "plan", "all four", "apply", "peak memory")
    name = QUICK[0]
    found = data["rewriting"][name] = child(__file__, "--child", f"rewriting,{name}", limit=LIMIT)
    cells = [found["failed"]] if "failed" in found else [
        f"{found['bytes'] / 1e9:.2f} GB", f"{found['largest'] / 2**20:.0f} MiB", short(found["seconds"]),
        f"{found['growth']:.0f} MiB",
    ]  # fmt: skip
    note = "scores: random ones, including the costs. all four: the sum of the four stages before it."
    return [
        Table("Analysis on the meta device", columns, tuple(rows), note),
        Table(
            "Narrowing a checkpoint", ("checkpoint", "size", "largest tensor", "time", "growth of memory"),
            ((name, *cells),), "The time includes applying the plan on the meta device first.",
        ),
    ], data  # fmt: skip


def _cells(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [found["failed"]]
    stages = [found[stage] for stage in ("capture", "couple", "scores", "plan")]
    times = [*stages, sum(stages), found["apply"]]
    return [millions(found["params"]), *map(short, times), f"{found['peak'] / 1024:.2f} GiB"]


JOBS = {"analysis": analysis, "rewriting": rewriting}


def main() -> None:
    """Measure, print and write."""
    options = parser(str(__doc__).partition("\n")[0], "shapes").parse_args()
    torch.set_num_threads(1)
    if options.child:
        job, _, name = options.child.partition(",")
        CONSOLE.file.write(json.dumps(JOBS[job](name)) + "\n")
        return
    tables, data = measure(quick=options.quick)
    publish("shapes", HEADING, tables, data, options)


if __name__ == "__main__":
    main()
