"""A vision transformer: whole heads, places of every head, and the hidden units of the MLPs.

python examples/vit.py        (needs pip install '.[demo]')
"""

from __future__ import annotations

import torch
from digits import accuracy, digits, loader_of, train
from torchvision.models import VisionTransformer

import fxprune

CHOICES = {
    "whole heads, and MLPs": {},
    "places of every head, and MLPs": {"head_dim": True},
    "MLPs alone": {"exclude": ["*.self_attention*"]},
}


def main() -> None:
    """Train, then prune the same network in three ways to the same budget."""
    torch.manual_seed(0)
    train_set, test_set = digits(channels=3)
    loader = loader_of(train_set)
    model = VisionTransformer(
        image_size=8, patch_size=2, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    train(model, loader, epochs=15)
    print(f"original: accuracy {accuracy(model, test_set):.3f}")

    for name, options in CHOICES.items():
        small = fxprune.compress(model, loader, macs=0.7, **options)
        report = fxprune.report(small)
        left = report.macs_after / report.macs_before
        print(f"{name}: {left:.0%} of the MACs, accuracy {accuracy(small, test_set):.3f}")
    print(report)


if __name__ == "__main__":
    main()
