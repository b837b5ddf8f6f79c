"""The architectures of the CIFAR-10 checkpoints, with the keys that the files have."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_WIDTHS = (64, "M", 128, "M", 192, 192, "M", 384, 384, "M", 384, 384, "M")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut, which has no parameters (He et al. 2016, section 4.2)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6 n + 2 layers: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self.stage(n, 16, 16, 1)
        self.layer2 = self.stage(n, 16, 32, 2)
        self.layer3 = self.stage(n, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def stage(n: int, inputs: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, width, stride), *(BasicBlock(width, width, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def resnet20() -> CifarResNet:
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    return CifarResNet(9)


def vgg() -> nn.Sequential:
    """Plain convolutions with BatchNorm and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_WIDTHS:
        if isinstance(width, int):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def load(build: object, data: Path) -> nn.Module:
    """A model in eval mode with the weights of the checkpoint that is called like its builder."""
    model: nn.Module = build()  # type: ignore[operator]
    name = build.__name__  # type: ignore[attr-defined]
    model.load_state_dict(torch.load(data / "models" / f"{name}.pt", weights_only=True))
    return model.eval()


def images(data: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` normalised images of a split, and their labels."""
    with np.load(data / "cifar10" / f"{split}.npz") as file:
        labels = torch.from_numpy(file["labels"][:count])
        stream, offsets = file["data"].tobytes(), file["offsets"][: len(labels) + 1]
    from PIL import Image

    pixels = [np.asarray(Image.open(BytesIO(stream[start:end]))) for start, end in pairwise(offsets)]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (x - mean) / std, labels
