"""A residual network: prune it to a share of its MACs, then train it on with the original as its teacher.

python examples/cnn.py        (needs pip install '.[demo,finetune]')
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from digits import accuracy, digits, loader_of, train
from torch import Tensor, nn

import fxprune

WIDTHS = (32, 64, 96)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network() -> nn.Sequential:
    """A stem, three blocks, and a linear layer on the mean over the positions."""
    first, second, third = WIDTHS
    blocks = (Block(first, first, 1), Block(first, second, 2), Block(second, third, 2))
    stem = (nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10))


def main() -> None:
    """Train, prune, train on."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    loader, held_out = loader_of(train_set), loader_of(test_set, shuffle=False)
    model = network()
    train(model, loader, epochs=8)

    small = fxprune.compress(model, loader, macs=0.3, round_to=8)
    tuned = fxprune.finetune(small, loader, held_out, epochs=3, lr=0.01, teacher=model)

    print(fxprune.report(tuned))
    for name, net in (("original", model), ("pruned", small), ("trained on", tuned)):
        print(f"{name}: accuracy {accuracy(net, test_set):.3f}")


if __name__ == "__main__":
    main()
