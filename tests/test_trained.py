"""A small vision transformer, trained on real images, pruned without any training after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import parameters
from torch import Tensor, nn

import fxprune

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


class Transformer(nn.Module):
    """Patches of 2 x 2 pixels, a class token, two pre-norm blocks of nn.MultiheadAttention and a ReLU network."""

    def __init__(self, width: int = 32, heads: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token, self.places = (nn.Parameter(0.02 * torch.randn(1, n, width)) for n in (1, 17))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "attention": nn.MultiheadAttention(width, heads, batch_first=True),
                    "second": nn.LayerNorm(width),
                    "mlp": nn.Sequential(
                        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, width)
                    ),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](block["second"](x))
        return self.head(self.norm(x)[:, 0])


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    """scikit-learn's digits: training images and labels, test images and labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return images[train], labels[train], images[test], labels[test]


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The model after a one-cycle run of AdamW, in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    steps = epochs * len(labels.split(50))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def test_a_vision_transformer_keeps_its_accuracy(digits: Digits) -> None:
    """Measured, in two runs of training: 98.2 % and 98.0 %, 97.6 % and 98.0 %, with 69 and 74 % of the parameters."""
    images, labels, test_images, test_labels = digits
    with seeded():
        model = trained(Transformer(), images, labels, epochs=40)
    full = accuracy(model, test_images, test_labels)
    assert full > 0.95
    loader = list(zip(images.split(100), labels.split(100), strict=True))
    small = fxprune.compress(model, loader, alpha=0.2, progress=False)
    assert parameters(small) <= 0.8 * parameters(model)
    assert accuracy(small, test_images, test_labels) >= full - 0.02
    smallest = fxprune.compress(model, loader, alpha=1.0, compensate="none", progress=False)
    assert max(block["attention"].num_heads for block in smallest.blocks) < 8
