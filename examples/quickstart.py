"""The five-line use, on scikit-learn's digits: train a small network, prune it, compare.

python examples/quickstart.py        (needs scikit-learn: pip install '.[demo]')
"""

from __future__ import annotations

import itertools

import torch
from digits import accuracy, digits, loader_of, train
from torch import nn

import fxprune

EPOCHS = 8
TUNING = 1


def network() -> nn.Sequential:
    """Three convolutions and a linear layer."""
    widths = (1, 32, 64, 64)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, 10))


def main() -> None:
    """Train, prune, compare, train a little more."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    loader, model = loader_of(train_set), network()
    train(model, loader, EPOCHS)

    small = fxprune.compress(model, loader, alpha=0.05)
    report = fxprune.report(small)

    print(report)
    print(f"accuracy: {accuracy(model, test_set):.3f} before, {accuracy(small, test_set):.3f} after, untrained")
    train(small, loader, TUNING)
    print(f"after {TUNING} epoch of training: {accuracy(small, test_set):.3f}")
    print(f"parameters: {report.params_before:,} -> {report.params_after:,}")


if __name__ == "__main__":
    main()
