"""Budgets: parameters, MACs and time; how the widths follow; and a sweep over tolerances from one set of scores.

python examples/budgets.py        (needs pip install '.[demo]')
"""

from __future__ import annotations

from typing import Any

import torch
from digits import accuracy, digits, loader_of, train
from torch import nn
from torch.utils.data import TensorDataset

import fxprune

BUDGETS: tuple[dict[str, Any], ...] = (
    {"params": 0.5},
    {"macs": 0.5},
    {"latency": 0.7},
    {"macs": 0.5, "round_to": 8},
    {"macs": 0.5, "allocate": "uniform"},
    {"alpha": 0.0},
    {"alpha": 0.1},
    {"alpha": 0.3},
)


def network() -> nn.Sequential:
    """Three convolutions and two linear layers."""
    convolutions: list[nn.Module] = []
    for before, after in ((1, 48), (48, 64), (64, 96)):
        convolutions += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 96, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def show(model: nn.Module, scores: fxprune.Scores, loader: Any, test_set: TensorDataset, asked: dict[str, Any]) -> None:
    """One line: what was asked for, and what came of it."""
    plan = scores.plan(**asked)
    small = fxprune.apply(model, plan, scores=scores, loader=loader, compensate="sequential")
    report = fxprune.report(small)
    params, macs = report.params_after / report.params_before, report.macs_after / report.macs_before
    widths = ", ".join(str(len(kept)) for kept in plan.keep.values())
    wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
    print(f"{wanted:28} {params:6.0%} {macs:6.0%} {accuracy(small, test_set):8.3f}   {widths}")


def main() -> None:
    """Train, score once, plan eight times."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    loader = loader_of(train_set)
    model = network()
    train(model, loader, epochs=6)
    print(f"original: accuracy {accuracy(model, test_set):.3f}")

    scores = fxprune.score(model, loader).with_latency(model, train_set.tensors[0][:64])
    print(f"{'asked for':28} {'params':>6} {'MACs':>6} {'accuracy':>8}   widths")
    for asked in BUDGETS:
        show(model, scores, loader, test_set, asked)


if __name__ == "__main__":
    main()
