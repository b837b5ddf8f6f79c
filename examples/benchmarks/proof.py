"""Cost of proving the captured graph: the time that it adds to `compress`.

    python examples/benchmarks/proof.py [--quick]

`capture` compares its graph with the caller's model on several small batches. Captures with and without that take
turns; the difference of their medians is set against one `compress` of the same model and loader.
"""

from __future__ import annotations

import warnings
from functools import partial
from statistics import median
from typing import Any

import torch
import torchvision
from measure import CONSOLE, Table, interleaved, parser, publish, seconds

import fxprune

MODELS = {"ResNet-50": torchvision.models.resnet50, "ViT-B/16": torchvision.models.vit_b_16}
NOTE = (
    "Times in seconds. Captures are medians of 3, in turns. `compress` is one run on the given number of images, at "
    "224 x 224, to 0.7 of the MACs (multiply-accumulate operations), with its default compensation. share: of the "
    "proof in `compress`."
)


def measured(name: str, images: int, repeats: int) -> dict[str, Any]:
    """Times of both captures of one model, and of `compress`."""
    torch.manual_seed(0)
    model = MODELS[name](weights=None).eval()
    batch = images // 2
    loader = [(torch.randn(batch, 3, 224, 224), torch.arange(batch) % 1000) for _ in range(images // batch)]
    capture = partial(fxprune.capture, model, loader[0][0], other=loader[1][0])
    times = interleaved({"without": partial(capture, prove=False), "with": capture}, repeats=repeats)
    compress = partial(fxprune.compress, model, loader, macs=0.7, progress=False)
    found = {key: median(values) for key, values in times.items()} | {"compress": seconds(compress)}
    return found | {"share": (found["with"] - found["without"]) / found["compress"], "images": images}


def main() -> None:
    """Measure both models."""
    options = parser("what the proof of the captured graph costs", "proof").parse_args()
    warnings.simplefilter("ignore")
    results = {name: measured(name, *((4, 1) if options.quick else (16, 3))) for name in MODELS}
    for name, found in results.items():
        CONSOLE.print(name, found)
    rows = [
        (name, f"{r['images']}", f"{r['without']:.2f}", f"{r['with']:.2f}", f"{r['compress']:.1f}", f"{r['share']:.1%}")
        for name, r in results.items()
    ]
    columns = ("model", "images", "capture without proof", "with proof", "compress", "share")
    heading = "Cost of proving the captured graph"
    publish("proof", heading, [Table("Time", columns, tuple(rows), NOTE)], results, options)


if __name__ == "__main__":
    main()
