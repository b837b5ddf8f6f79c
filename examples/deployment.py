"""Deployment: keep a pruned network in a file, make it again, give it its own class, export it, and time it.

python examples/deployment.py [FOLDER]        (needs pip install '.[demo,export]')
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from digits import accuracy, digits, loader_of, train
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

import fxprune


def network() -> ResNet:
    """Torchvision's ResNet with one block a stage, for ten classes."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def milliseconds(model: nn.Module, images: Tensor) -> float:
    """The median time of a forward pass on one thread."""
    with torch.inference_mode():
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=1)
        return 1e3 * timer.blocked_autorange(min_run_time=1.0).median


def main(folder: Path) -> None:
    """Train, prune, and use the result in every form."""
    torch.manual_seed(0)
    train_set, test_set = digits(channels=3)
    loader, model = loader_of(train_set), network()
    train(model, loader, epochs=4)
    images = test_set.tensors[0][:32]
    small = fxprune.compress(model, loader, macs=0.5, round_to=8)
    print(f"accuracy: {accuracy(model, test_set):.3f}, pruned {accuracy(small, test_set):.3f}")

    fxprune.save(small, folder / "small.safetensors")
    with torch.device("meta"):
        architecture = network()  # costs nothing; load only needs its structure
    loaded = fxprune.load(folder / "small.safetensors", architecture)
    with torch.inference_mode():
        print(f"loaded, the same outputs: {torch.equal(loaded(images), small(images))}")

    own = fxprune.narrow(model, small.meta["fxprune"].plan, weights=small)
    print(f"own class: {type(own).__name__}, first layer {own.conv1}")

    for name in ("small.onnx", "small.pt2"):
        print(f"{name}: error {fxprune.export(small, folder / name, images):.1e}")

    print(f"milliseconds for 32 images: {milliseconds(model, images):.1f} -> {milliseconds(small, images):.1f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
