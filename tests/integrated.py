"""Small models for the integrations: one of transformers, and a LightningModule."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T = pytest.importorskip("transformers")
    try:
        from lightning.pytorch import LightningModule, Trainer
    except ImportError:
        LightningModule, Trainer = (
            getattr(pytest.importorskip("pytorch_lightning"), n) for n in ("LightningModule", "Trainer")
        )

__all__ = ["SILENT", "LitDigits", "Trainer", "bert", "digit_batches", "sentences"]

TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
SILENT: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    return T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=3, **options)).eval()


def sentences(batch: int, length: int = 9) -> dict[str, Tensor]:
    """Words, a mask, labels, and a column that no forward takes."""
    words = torch.randint(2, 48, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(words)
    mask[0, length - 3 :] = 0
    return {"input_ids": words, "attention_mask": mask, "labels": torch.arange(batch) % 3, "idx": torch.arange(batch)}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


class LitDigits(LightningModule):  # type: ignore[misc]
    """Logs, normalises batches in a hook, and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion = network(), nn.CrossEntropyLoss()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return images / 2, labels

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = self.criterion(self.model(images), labels)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 8)]


class Digits(torch.utils.data.Dataset[Any]):
    """Three kinds of images: stripes across, stripes along, and spots."""

    def __init__(self, count: int = 48) -> None:
        stripes = (torch.arange(8) % 2).float()
        kinds = (stripes.expand(8, 8), stripes.expand(8, 8).T, stripes.outer(stripes))
        noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(count) % 3
        self.images = torch.stack([kinds[int(label)] for label in self.labels]).unsqueeze(1) + 0.3 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels[index]


def digit_batches() -> Any:
    return torch.utils.data.DataLoader(Digits(), batch_size=16, shuffle=True)


def accuracy(model: nn.Module) -> float:
    data = Digits()
    with torch.no_grad():
        return float((F.softmax(model(data.images / 2), 1).argmax(1) == data.labels).float().mean())
