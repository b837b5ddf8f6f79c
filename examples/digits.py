"""What the other examples share: scikit-learn's digits, a training loop, and the accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


def digits(channels: int = 1) -> tuple[TensorDataset, TensorDataset]:
    """1,797 seeded, shuffled images, (channels, 8, 8) in 0 to 1: four fifths to train on, the rest to test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(data.target)[order]
    split = len(labels) * 4 // 5
    images = images.repeat(1, channels, 1, 1)
    return TensorDataset(images[:split], labels[:split]), TensorDataset(images[split:], labels[split:])


def loader_of(data: TensorDataset, *, shuffle: bool = True) -> Loader:
    """Batches of 64."""
    return DataLoader(data, batch_size=64, shuffle=shuffle)


def train(model: nn.Module, loader: Loader, epochs: int, lr: float = 2e-3) -> None:
    """Train with AdamW along a cosine; the model is left in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of images whose class is predicted right."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())
