"""CIFAR-10: the networks of the checkpoints, the images, and the accuracy of a model on them.

The folder with the data is named by the environment variable ``FXPRUNE_DATA``. It holds
``cifar10/train.npz``, ``cifar10/test.npz`` (JPEG bytes, offsets, labels, class names) and
``models/resnet20.pt``, ``models/resnet56.pt``, ``models/vgg.pt`` (state_dicts).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CLASSES = 10
BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
VGG_WIDTHS: tuple[int | str, ...] = (64, "M", 128, "M", 192, 192, "M", 384, 384, "M", 384, 384, "M")

Batches = list[tuple[Tensor, Tensor]]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.narrows = stride != 1 or width_in != width
        self.pad = width // 4

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, width_in, H, W) to (n, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.narrows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers (He et al. 2016, section 4.2), option-A shortcuts.

    >>> CifarResNet(3)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, blocks: int, classes: int = CLASSES, *, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, 32, 32) to logits (n, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, 8)
        logits: Tensor = self.linear(x.view(x.size(0), -1))
        return logits


def _stage(width_in: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(width_in, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


def cifar_vgg(classes: int = CLASSES) -> nn.Sequential:
    """A plain stack of convolution, BatchNorm and ReLU with five max-pools, then one Linear."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def build(name: str, classes: int = CLASSES) -> nn.Module:
    """The named architecture with fresh weights, in eval mode."""
    net = cifar_vgg(classes) if name == "vgg" else CifarResNet(BLOCKS[name], classes)
    return net.eval()


def trained(name: str) -> nn.Module:
    """The named architecture with the weights of its checkpoint, in eval mode."""
    model = build(name)
    path = data_folder() / "models" / f"{name}.pt"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def data_folder() -> Path:
    """The folder that FXPRUNE_DATA names; exits with the remedy where it is unset or wrong."""
    folder = os.environ.get("FXPRUNE_DATA")
    if not folder:
        raise SystemExit("FXPRUNE_DATA is unset: set it to the folder that holds cifar10/ and models/")
    path = Path(folder)
    if not (path / "cifar10").is_dir():
        raise SystemExit(f"FXPRUNE_DATA={folder} holds no folder cifar10/")
    return path


def load_images(split: str, chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, 32, 32) and labels (n,) of a split, all or the chosen ones."""
    with np.load(data_folder() / "cifar10" / f"{split}.npz") as archive:
        data, offsets, labels = archive["data"], archive["offsets"], archive["labels"]
    order = range(len(labels)) if chosen is None else chosen
    pixels = np.stack([_decode(data[offsets[i] : offsets[i + 1]].tobytes()) for i in order])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return images.contiguous(), torch.from_numpy(labels[list(order)].astype(np.int64))


def _decode(jpeg: bytes) -> np.ndarray:
    """The pixels (32, 32, 3) of one JPEG file."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def calibration_set(per_class: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A class-balanced, seeded and shuffled choice of training images: 10 * per_class of them."""
    return load_images("train", drawn(per_class, seed=seed))


def drawn(per_class: int, *, seed: int = 0, but: Sequence[int] = ()) -> list[int]:
    """The numbers of such training images, without some others."""
    with np.load(data_folder() / "cifar10" / "train.npz") as archive:
        labels = archive["labels"].copy()
    labels[list(but)] = -1
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(CLASSES)]
    return [int(i) for i in rng.permutation(np.concatenate(chosen))]


def batches_of(images: Tensor, labels: Tensor, batch_size: int = 100) -> Batches:
    """The images as a list of batches that are already in memory."""
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def loader_of(images: Tensor, labels: Tensor, batch_size: int = 100) -> DataLoader[tuple[Tensor, ...]]:
    """The images as an unshuffled DataLoader over a TensorDataset."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of correct predictions, in [0, 1], in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    right = total = 0
    for images, labels in batches:
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    model.train(training)
    return right / total
