"""Depth against width: quality and latency where branches are removed whole, where layers get narrower, or both.

The small LLaMA and the ResNet-56 of the data folder (``FXPRUNE_DATA``, see cifar.py), at shares of the
multiply-accumulates, each allocated by measured curves and refitted.
Run as ``python examples/benchmarks/depth.py llama resnet --shares 0.8 0.5``.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import torch
import torch.nn.functional as F
from measure import CONSOLE, Table
from torch import Tensor, nn

import fxprune

WAYS: dict[str, Any] = {"width": False, "depth": "only", "both": True}
BATCHES = (1, 32)
WINDOW = 128  # tokens


class Logits(nn.Module):
    """A language model that gives logits alone, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        """(n, tokens) to (n, tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=words, use_cache=False).logits
        return logits


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its calibration batches and options, the figure of its quality, and the inputs that are timed."""

    model: nn.Module
    calibration: Sequence[tuple[Tensor, Tensor]]
    options: dict[str, Any]
    quality: Callable[[nn.Module], float]
    measure: str
    inputs: Callable[[int], Tensor]


def next_token(logits: Tensor, words: Tensor) -> Tensor:
    """The mean loss of predicting each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def llama(windows: int = 128) -> Case:
    """The small LLaMA; the quality is the perplexity on 64 windows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(os.environ["FXPRUNE_DATA"]) / "lm"
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=384, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(torch.load(folder / "llama.pt", weights_only=True), strict=False)
    train, held = (torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64)) for name in ("train", "val"))
    words = train[: windows * WINDOW].view(-1, 16, WINDOW)
    texts = held[: 64 * WINDOW].view(-1, 16, WINDOW)

    @torch.no_grad()
    def perplexity(small: nn.Module) -> float:
        return math.exp(float(np.mean([float(next_token(small(text), text)) for text in texts])))

    batches = [(batch, batch) for batch in words]
    options = {"loss": next_token, "new_biases": False}
    return Case(
        Logits(model).eval(), batches, options, perplexity, "perplexity", lambda n: train[: n * WINDOW].view(n, WINDOW)
    )


def resnet(per_class: int = 50) -> Case:
    """The CIFAR ResNet-56; the quality is the accuracy on 2000 images of the test set."""
    batches = cifar.batches_of(*cifar.calibration_set(per_class))
    images, labels = cifar.load_images("test", range(2000))
    held = cifar.batches_of(images, labels, 250)
    return Case(
        cifar.trained("resnet56").eval(), batches, {}, lambda small: cifar.accuracy(small, held), "accuracy",
        lambda n: images[:n],
    )  # fmt: skip


@torch.no_grad()
def latencies(models: dict[str, nn.Module], inputs: Tensor, rounds: int) -> dict[str, float]:
    """The lowest seconds of each model, all measured in turns, so that they share what else the machine does."""
    found = dict.fromkeys(models, math.inf)
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs)
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def compared(name: str, case: Case, shares: Sequence[float], rounds: int) -> Table:
    """A table of all ways at all shares of the multiply-accumulates."""
    models: dict[str, nn.Module] = {"original": fxprune.capture(case.model, case.calibration[0][0])}
    for share in shares:
        for way, blocks in WAYS.items():
            small = fxprune.compress(
                case.model,
                case.calibration,
                macs=share,
                blocks=blocks,
                allocate="measured",
                progress=False,
                **case.options,
            )
            models[f"{way}, {share:g} of the MACs"] = small.eval()
            CONSOLE.print(f"{name} {way} {share:g}: {small.meta['fxprune'].plan.removed_branches}")
    times = {n: latencies(models, case.inputs(n), rounds) for n in BATCHES}
    rows = []
    for label, model in models.items():
        macs = fxprune.report(model).macs_after if label != "original" else None
        before = fxprune.report(models[next(reversed(models))]).macs_before
        left = "100 %" if macs is None else f"{macs / before:.0%}"
        faster = [f"{times[n]['original'] / times[n][label]:.2f}" for n in BATCHES]
        rows.append((label, left, f"{case.quality(model):.4g}", *faster))
    columns = ("", "MACs", case.measure, *(f"times as fast, batch {n}" for n in BATCHES))
    return Table(name, columns, tuple(rows))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["llama", "resnet"], choices=["llama", "resnet"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8, 0.6, 0.5])
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.manual_seed(0)
    for name in given.cases:
        table = compared(name, {"llama": llama, "resnet": resnet}[name](), given.shares, given.rounds)
        CONSOLE.print(table.rich())
        print(table.markdown())


if __name__ == "__main__":
    main()
