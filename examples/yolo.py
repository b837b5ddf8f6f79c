"""A YOLO of ultralytics: prune it, train it on with its own trainer, validate, export to ONNX, load it again.

python examples/yolo.py [yolov8n.yaml]        (needs pip install '.[export]' ultralytics)

Any detector, segmenter or pose network of ultralytics is taken by its yaml: yolov5n.yaml, yolo11n-seg.yaml,
yolo12n.yaml, yolo26n-pose.yaml. The images are noise with a bright square or disc. With weights of your own, give
YOLO("best.pt") in place of the yaml, and your own data.yaml.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxprune

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())  # ultralytics writes its settings there
os.environ.setdefault("YOLO_OFFLINE", "true")

from PIL import Image
from ultralytics import YOLO
from ultralytics.utils import LOGGER, YAML

SIDE, COUNTS, EPOCHS, TUNED, MACS = 64, {"train": 128, "val": 32}, 40, 1, 0.6
CORNERS = {"square": 4, "disc": 16}


def data_set(folder: Path, task: str) -> Path:
    """Write images with one object each, and their labels for a task; gives the path of the data.yaml."""
    generator = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image, label = scene(generator, index % 2, task)
            Image.fromarray(image).save(folder / "images" / split / f"{index}.png")
            (folder / "labels" / split / f"{index}.txt").write_text(" ".join(map(str, label)))
    described = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(CORNERS))}
    YAML.save(folder / "data.yaml", described | ({"kpt_shape": [4, 2]} if task == "pose" else {}))
    return folder / "data.yaml"


def scene(generator: np.random.Generator, kind: int, task: str) -> tuple[np.ndarray, list[float]]:
    """An image (side, side, 3) of bytes, and its label: the class, and shares of the side."""
    radius = generator.uniform(0.12, 0.25)
    centre = generator.uniform(radius, 1 - radius, 2)
    at = (np.arange(SIDE) + 0.5) / SIDE
    across, down = np.abs(at - centre[0])[None], np.abs(at - centre[1])[:, None]
    inside = np.maximum(across, down) < radius if kind == 0 else np.hypot(across, down) < radius
    image = generator.integers(0, 90, (SIDE, SIDE, 3)) + 150 * inside[..., None]
    count = list(CORNERS.values())[kind]
    turn = (np.arange(count) + 0.5) / count * 2 * np.pi
    outline = centre + radius * np.stack([np.cos(turn), np.sin(turn)], 1) * (2**0.5 if kind == 0 else 1)
    box = [*centre, 2 * radius, 2 * radius]
    if task == "segment":
        return image.astype(np.uint8), [kind, *outline.clip(0, 1).ravel()]
    return image.astype(np.uint8), [kind, *box, *(outline[:: count // 4].clip(0, 1).ravel() if task == "pose" else ())]


class Loss:
    """The loss of a YOLO's own trainer, of the output that the network gives in eval mode."""

    def __init__(self, model: Any) -> None:
        self.criterion = model.init_criterion()

    def __call__(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        total: Tensor = self.criterion(output, batch)[0].sum()
        return total / len(batch["img"])


def pruned(yolo: YOLO, trainer: Any) -> nn.Module:
    """The network of a YOLO, smaller and of its own class, scored on the trainer's images."""

    def unpack(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        batch = trainer.preprocess_batch(batch)
        return batch["img"], {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    network = yolo.model.float().requires_grad_()
    network.args = trainer.args  # the weights of the parts of its loss
    loader = trainer.get_dataloader(trainer.data["val"], batch_size=16, mode="val")
    return fxprune.compress(network, loader, macs=MACS, own_class=True, loss=Loss(network), unpack=unpack)


def training_with(network: nn.Module, kind: Any) -> Any:
    """A trainer of ultralytics that trains this network in place of one that it would build."""
    return type(kind.__name__, (kind,), {"get_model": lambda self, *args, **options: network})


def main() -> None:
    """Train, prune, train on, validate, export, load again."""
    torch.manual_seed(0)
    LOGGER.setLevel(logging.ERROR)
    name = sys.argv[1] if len(sys.argv) > 1 else "yolov8n.yaml"
    yolo = YOLO(name, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        data = {"data": str(data_set(Path(folder) / "shapes", yolo.task)), "imgsz": SIDE, "batch": 16, "device": "cpu"}
        quiet = {"project": folder, "plots": False, "verbose": False, "workers": 0}
        training = data | quiet | {"optimizer": "AdamW", "warmup_epochs": 0, "mosaic": 0.0}
        yolo.train(epochs=EPOCHS, lr0=2e-3, **training)
        print(f"original: mAP50 {yolo.val(**data, **quiet).box.map50:.3f}")

        small = pruned(yolo, yolo.trainer)
        print(fxprune.report(small))
        yolo.model = copy.deepcopy(small)  # validation fuses its layers
        print(f"pruned: mAP50 {yolo.val(**data, **quiet).box.map50:.3f}")

        yolo.train(trainer=training_with(small, type(yolo.trainer)), epochs=TUNED, lr0=3e-4, **training)
        again = YOLO(yolo.trainer.best)
        print(f"trained on, loaded from best.pt: mAP50 {again.val(**data, **quiet).box.map50:.3f}")
        print(f"{type(again.model).__name__} of {sum(p.numel() for p in again.model.parameters()):,} parameters")
        exported = YOLO(again.export(format="onnx", imgsz=SIDE, simplify=False, dynamic=True), task=yolo.task)
        print(f"onnx: mAP50 {exported.val(**data, **quiet).box.map50:.3f}")


if __name__ == "__main__":
    main()
