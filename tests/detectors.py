"""A toy detector that cannot be captured as a whole, batches for it and for torchvision's, and how to score them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from helpers import parameters, storages
from nets import layers
from torch import Tensor, nn
from zoo.case import conv, randomise

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@layers(lambda: dict(
    out_channels=6, stem=nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()),
    body=nn.Sequential(conv(8, 10), nn.BatchNorm2d(10), nn.ReLU()), fine=conv(8, 6, 1), coarse=conv(10, 6, 1),
))  # fmt: skip
def Pyramid(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Two feature maps by name, and a number that the rest of the model reads."""
    x = self.stem(x) * scale
    return OrderedDict(fine=self.fine(x), coarse=self.coarse(self.body(x)))


class Detector(nn.Module):
    """Pads images of different sizes, and picks positions whose score is high: no tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pyramid()
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(self.backbone.out_channels, 4, 1)
        self.noise = nn.Dropout(0.1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        maps = self.backbone(self.pad(images), scale=1.0)
        assert self.backbone.out_channels == 6
        logits = [self.head(self.noise(self.norm(x))).mean((2, 3)) for x in maps.values()]
        if self.training:
            assert targets is not None
            wanted = torch.stack([target["labels"].max() for target in targets])
            return {str(index): F.cross_entropy(x, wanted) for index, x in enumerate(logits)}
        found = []
        for scores in sum(logits).softmax(1):
            best = int(scores.argmax())
            found.append({"label": torch.tensor(best), "scores": scores} if float(scores[best].detach()) > 0 else {})
        return found

    def pad(self, images: list[Tensor]) -> Tensor:
        side = max(max(image.shape[1:]) for image in images)
        padded = images[0].new_zeros(len(images), 3, side, side)
        for image, place in zip(images, padded, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return padded


def random_batch(sizes: tuple[tuple[int, int], ...], seed: int = 0, scale: int = 1) -> Batch:
    """Images of the given sizes, each with one or two boxes."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, height * scale, width * scale, generator=generator) for height, width in sizes]
    corners = torch.tensor([[1.0, 1.0, 6.0, 7.0], [2.0, 3.0, 8.0, 8.0]]) * scale
    return images, [
        {"boxes": corners[: 1 + index % 2], "labels": torch.tensor([1 + (index + seed) % 3] * (1 + index % 2))}
        for index in range(len(sizes))
    ]


BATCHES = [random_batch(((9, 10), (12, 9), (10, 10)), seed=0), random_batch(((10, 11), (9, 9)), seed=1)]


def classes_of(targets: Any) -> Tensor:
    return torch.stack([target["labels"].max() for target in targets])


def run(model: Any, images: Any, targets: Any) -> Tensor:
    total: Any = sum(model.train()(images, targets).values())
    return total


OPTIONS: dict[str, Any] = {"submodule": "backbone", "run": run, "classes": classes_of, "progress": False}


def detector() -> Detector:
    torch.manual_seed(0)
    model = Detector()
    randomise(model)
    return model


def pyramid_input() -> Tensor:
    return torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(7))


def check_parts(model: nn.Module, small: nn.Module) -> None:
    """The rest is the model's own, copied; the part is smaller."""
    assert type(small) is type(model)
    assert isinstance(small.backbone, torch.fx.GraphModule)
    assert list(small.state_dict()) == list(model.state_dict())
    assert storages(small).isdisjoint(storages(model))
    assert parameters(small) < parameters(model)
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in rest.items())
