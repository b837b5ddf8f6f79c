"""A detector: prune its backbone by the loss of the whole, which nothing can trace in one piece.

python examples/detector_backbone.py        (needs pip install '.[demo]')

The images are 40 x 40 canvases with two digits each; the detector is torchvision's Faster R-CNN with a small backbone.
"""

from __future__ import annotations

import torch
from digits import digits
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

import fxprune

SIDE, DIGIT, IMAGES, EPOCHS = 40, 16, 160, 8
Scene = tuple[Tensor, dict[str, Tensor]]
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Backbone(nn.Module):
    """Four convolutions; one map at a quarter of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 2), (48, 48, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers, self.out_channels = nn.Sequential(*layers), 48

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 3, h, w) to (n, 48, h / 4, w / 4)."""
        maps: Tensor = self.layers(x)
        return maps


def scenes(count: int, seed: int) -> list[Scene]:
    """Canvases with a digit in the left half and one in the right, at random heights."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()[0].tensors
    large = nn.functional.interpolate(images, size=(DIGIT, DIGIT))
    made = []
    for _ in range(count):
        canvas = 0.1 * torch.rand(3, SIDE, SIDE, generator=generator)
        chosen = torch.randint(len(images), (2,), generator=generator)
        corners = torch.randint(SIDE // 2 - DIGIT, (2,), generator=generator) + torch.tensor([0, SIDE // 2])
        tops = torch.randint(SIDE - DIGIT, (2,), generator=generator)
        for index, x, y in zip(chosen, corners, tops, strict=True):
            canvas[:, y : y + DIGIT, x : x + DIGIT] += large[index]
        boxes = torch.stack([corners, tops, corners + DIGIT, tops + DIGIT], 1).float()
        made.append((canvas, {"boxes": boxes, "labels": labels[chosen] + 1}))
    return made


def batched(found: list[Scene], size: int = 8) -> list[Batch]:
    """Lists of images and of targets."""
    parts = (found[start : start + size] for start in range(0, len(found), size))
    return [([image for image, _ in part], [target for _, target in part]) for part in parts]


def detector() -> FasterRCNN:
    """Faster R-CNN on one map, with anchors of one size."""
    return FasterRCNN(
        Backbone(), num_classes=11, min_size=SIDE, max_size=SIDE,
        rpn_anchor_generator=AnchorGenerator(((DIGIT,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=20, box_batch_size_per_image=32,
    )  # fmt: skip


def loss_of(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """The sum of the losses that the detector gives in training mode."""
    total: Tensor = sum(model.train()(images, targets).values())
    return total


def train(model: nn.Module, loader: list[Batch]) -> None:
    """Train with AdamW; the model is left in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for images, targets in loader:
            optimizer.zero_grad()
            loss_of(model, images, targets).backward()
            optimizer.step()
    model.eval()


@torch.inference_mode()
def found(model: nn.Module, held_out: list[Scene]) -> float:
    """The share of digits of which a box of the right class covers more than half (intersection over union)."""
    hits, wanted = 0, 0
    for image, target in held_out:
        result = model([image])[0]
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            same = result["boxes"][result["labels"] == label]
            hits += bool(len(same) and box_iou(box[None], same).max() > 0.5)
            wanted += 1
    return hits / wanted


def main() -> None:
    """Train, prune the backbone, compare."""
    torch.manual_seed(0)
    loader, held_out = batched(scenes(IMAGES, seed=0)), scenes(60, seed=1)
    model = detector()
    train(model, loader)
    print(f"original: {found(model, held_out):.0%} of the digits found")

    small = fxprune.compress(model, loader, macs=0.6, submodule="backbone", run=loss_of)
    print(fxprune.report(small))
    print(f"backbone pruned: {found(small.eval(), held_out):.0%} of the digits found")


if __name__ == "__main__":
    main()
