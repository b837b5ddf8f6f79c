"""What the code on the pages of the documentation takes as given: small models, loaders, inputs."""

from __future__ import annotations

import json
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torchvision
from detectors import BATCHES, classes_of, detector, run
from nets import layers
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

import fxprune


def labelled(*shape: int, batches: int = 2, size: int = 24, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, *shape), torch.arange(size) % classes) for _ in range(batches)]


def layer(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


def convolutions() -> nn.Sequential:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))
    return nn.Sequential(*layer(3, 16), *layer(16, 24), *head).eval()


def staged() -> nn.Sequential:
    """Stages with names, and a transposed convolution."""
    stages = OrderedDict(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        stage1=nn.Sequential(*layer(8, 48)),
        stage2=nn.Sequential(*layer(48, 48)),
        stage3=nn.Sequential(*layer(48, 16)),
        up=nn.ConvTranspose2d(16, 8, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(8, 3),
    )
    return nn.Sequential(stages).eval()


@layers(lambda: dict(lstm=nn.LSTM(6, 16, batch_first=True), head=nn.Linear(16, 3)))
def Reader(self, x: Tensor) -> Tensor:
    logits: Tensor = self.head(self.lstm(x)[0][:, -1])
    return logits


def basics() -> dict[str, Any]:
    loader = labelled(3, 8, 8)
    names = {"fxprune": fxprune, "torch": torch, "nn": nn, "model": convolutions(), "loader": loader}
    return names | {"images": loader[0][0], "train_loader": loader, "val_loader": labelled(3, 8, 8, batches=1)}


def for_recipes() -> dict[str, Any]:
    size = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 32}
    vit: nn.Module = VisionTransformer(**size, num_classes=3)  # type: ignore[arg-type]
    names = {"model": staged(), "vit": vit.eval(), "image_loader": labelled(3, 8, 8)}
    names |= {"reader": Reader().eval(), "sequence_loader": labelled(5, 6)}
    images = torch.zeros(2, 3, 8, 8)
    names |= {"accuracy": lambda net: float((net(images).argmax(1) == 0).float().mean())}
    return names | {"detector": detector(), "detector_loader": BATCHES}


def for_language_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    words = torch.randint(2, 48, (8, 9))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained("llama")  # a folder, for the way block by block
    return {"llama": llama, "texts": [batch, batch], "words": words, "mask": batch["attention_mask"]}


@layers(lambda: dict(norm=nn.LayerNorm(8), fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8)))
def Residual(self, x: Tensor) -> Tensor:
    return x + self.fc2(self.fc1(self.norm(x)).relu())


@layers(lambda: dict(stem=nn.Linear(5, 8), blocks=nn.ModuleList(Residual() for _ in range(4)), head=nn.Linear(8, 3)))
def Residuals(self, x: Tensor) -> Tensor:
    x = self.stem(x)
    for block in self.blocks:
        x = block(x)
    logits: Tensor = self.head(x)
    return logits


def for_blocks() -> dict[str, Any]:
    return for_language_models() | {"model": Residuals().eval(), "loader": labelled(5)}


def for_parts() -> dict[str, Any]:
    return {"detector": detector(), "loader": BATCHES, "run": run, "classes": classes_of}


def tiny_resnet(**options: Any) -> ResNet:
    """A ResNet with one block a stage; stands for the large one where a page names that."""
    del options
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)


def for_deployment() -> dict[str, Any]:
    model, images = tiny_resnet().eval(), torch.randn(4, 3, 32, 32)
    plan = fxprune.Scores.random(model, images).plan(alpha=0.3)
    names = {"json": json, "safetensors": safetensors, "torchvision": torchvision, "model": model, "images": images}
    return names | {"plan": plan, "small": fxprune.apply(model, plan), "path": "built.safetensors"}


def for_fine_tuning() -> dict[str, Any]:
    model = convolutions()
    return {"model": model, "small": fxprune.compress(model, labelled(3, 8, 8), macs=0.8)}


def for_reports() -> dict[str, Any]:
    model, loader = convolutions(), labelled(3, 8, 8)
    small, other = (fxprune.compress(model, loader, macs=share) for share in (0.6, 0.8))
    names = {"model": model, "small": small, "other": fxprune.report(other)}
    return names | {"accuracy": lambda net: float((net(loader[0][0]).argmax(1) == loader[0][1]).float().mean())}


def for_integrations() -> dict[str, Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("fxprune.integrations.lightning", exc_type=ImportError)
    from integrated import SILENT, LitDigits, Trainer, bert, digit_batches, sentences

    batch = sentences(8)
    names = {"bert": bert(), "sentences": [batch, sentences(6)], "mask": batch["attention_mask"]}
    names |= {"words": batch["input_ids"], "labels": batch["labels"], "train_loader": digit_batches()}
    return names | {
        "Trainer": partial(Trainer, **SILENT), "LitDigits": LitDigits, "module": LitDigits(),
        "trained_module": LitDigits(),
    }  # fmt: skip


def for_experts() -> dict[str, Any]:
    pytest.importorskip("transformers")
    from experts import family, words

    batch = words(6, 8)
    return {"mixtral": family("mixtral"), "sentences": [batch | {"labels": batch["input_ids"]}]}


def for_checkpoints() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    tensors, places = transformers.LlamaForCausalLM(config).state_dict(), dict[str, str]()
    Path("llama").mkdir()
    for index, half in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        places |= dict.fromkeys(half, f"model-{index}.safetensors")
        save_file({name: tensors[name] for name in half}, f"llama/model-{index}.safetensors")
    Path("llama/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    names = {"transformers": transformers, "config": config, "pathlib": pathlib, "safetensors": safetensors}
    return names | {"source_dir": "llama", "target_dir": "llama-again"}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "recipes.md": for_recipes,
    "blocks.md": for_blocks,
    "cnn.md": for_recipes,
    "transformer.md": for_recipes,
    "lstm.md": for_recipes,
    "llm.md": for_language_models,
    "experts.md": for_experts,
    "parts.md": for_parts,
    "deployment.md": for_deployment,
    "finetuning.md": for_fine_tuning,
    "reports.md": for_reports,
    "integrations.md": for_integrations,
    "checkpoints.md": for_checkpoints,
    "rules.md": dict,
}


def given(page: str) -> dict[str, Any]:
    """The names that the code of a page starts with."""
    return {"__name__": f"docs_{page.partition('.')[0]}"} | basics() | GIVEN.get(page, dict)()
