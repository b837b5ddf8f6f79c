"""The five-line use, on scikit-learn's digits: train a small network, prune it, compare.

python examples/quickstart.py        (needs scikit-learn: pip install 'fxprune[demo]')
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune

EPOCHS = 8
TUNING = 1


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 seeded, shuffled images of 8 x 8 pixels: four fifths to train on, the rest to test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(data.target)[order]
    split = len(labels) * 4 // 5
    return TensorDataset(images[:split], labels[:split]), TensorDataset(images[split:], labels[split:])


def network() -> nn.Sequential:
    """Three convolutions and a linear layer."""
    widths = (1, 32, 64, 64)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, 10))


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train with Adam; the model is left in eval mode."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of images whose class is predicted right."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, prune, compare, train a little more."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    loader, model = DataLoader(train_set, batch_size=64, shuffle=True), network()
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
