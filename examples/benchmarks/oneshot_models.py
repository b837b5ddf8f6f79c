"""The trained models of the one-shot benchmark, their data, and the one measure of cost and of training for all.

Three are checkpoints on CIFAR-10 (see cifar.py), three are real networks of other kinds (see oneshot_real.py). Two are
trained here, in seconds, on scikit-learn's digits: an LSTM that reads an image as 8 rows of 8 numbers, and a
transformer over 16 patches of 2 x 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from oneshot_real import TASKS, Batches, Task
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.scoring.divergence import Divergence

CIFAR = ("resnet20", "resnet56", "vgg")
BATCH = 100
TUNING_IMAGES = 500  # of each class
TUNING_EPOCHS = 2
TUNING_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Workload:
    """A trained model with its calibration batches and its measure.

    `fresh` are other inputs of the same kind, up to 1,000. `stream` names the layers that write to its residual stream.
    `loss` is None for the cross-entropy of classes. Budgets are shares of the `cost`: "macs", or "params" without the
    embedding.
    """

    model: nn.Module
    calibration: Batches
    measure: Callable[[nn.Module], float]
    fresh: Sequence[Tensor]
    stream: tuple[str, ...] = ()
    loss: Callable[[Any, Any], Tensor] | None = None
    unit: str = "%"
    cost: str = "macs"

    @property
    def example(self) -> Tensor:
        """Two inputs."""
        example: Tensor = self.calibration[0][0][:2]
        return example

    @property
    def options(self) -> dict[str, Any]:
        """What scoring is told of this model."""
        return {"progress": False} | ({} if self.loss is None else {"loss": self.loss})

    def budget(self, share: float) -> dict[str, float]:
        """A budget as `compress` takes it: of all parameters, for a share of those without the embedding."""
        if self.cost == "macs":
            return {"macs": share}
        whole, fixed = params(self.model), embedding(self.model)
        return {"params": (fixed + share * (whole - fixed)) / whole}

    def lost(self, model: nn.Module) -> float:
        """The divergence of a model's outputs from the original's on inputs that nothing was chosen by or fitted to."""
        axis = 2 if self.unit == "perplexity" else 1
        divergence = Divergence(((0, axis),) if self.loss is None or axis == 2 else ())
        with torch.no_grad():
            goals, found = ([net(x) for x in self.fresh] for net in (self.model, model))
        measure, sizes = divergence.scaled(goals), [len(x) for x in self.fresh]
        return sum(n * measure(*pair) for n, *pair in zip(sizes, goals, found, strict=True)) / sum(sizes)

    def size(self, model: nn.Module) -> int:
        """The cost of a model."""
        return macs(model, self.example) if self.cost == "macs" else params(model) - embedding(self.model)


class RowReader(nn.Module):
    """An LSTM over the rows of an image, and a linear layer on its output at the last row.

    >>> RowReader()(torch.zeros(2, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 8, 8) to logits (n, 10)."""
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Layer(nn.Module):
    """A pre-norm transformer layer with separate projections for queries, keys and values."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp1, self.mlp2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.heads, self.scale = heads, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, t, width) to tokens (n, t, width)."""
        y = self.norm1(x)
        n, t = x.shape[0], x.shape[1]
        q, k, v = (f(y).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, -1))
        out: Tensor = x + self.mlp2(F.gelu(self.mlp1(self.norm2(x))))
        return out


class SmallViT(nn.Module):
    """A transformer over the 16 patches of an 8 x 8 image; the mean of the tokens is classified.

    >>> SmallViT()(torch.zeros(2, 16, 4)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 64, heads: int = 4, inner: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, heads, inner) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map patches (n, 16, 4) to logits (n, 10)."""
        x = self.layers(self.embed(x) + self.position)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def rows(images: Tensor) -> Tensor:
    """Images (n, 8, 8) as they are: 8 rows of 8 numbers."""
    return images


def patches(images: Tensor) -> Tensor:
    """The 2 x 2 patches of images (n, 8, 8), as (n, 16, 4)."""
    return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)


DIGITS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "lstm": (RowReader, rows),
    "vit": (SmallViT, patches),
}
MODELS = (*CIFAR, *DIGITS, *TASKS)


def workload(name: str, weights: Path, *, quick: bool) -> Workload:
    """The named model with its calibration and test batches; `weights` is the folder of what was trained here."""
    if name in CIFAR:
        chosen = range(0, 5000, 10) if quick else None
        test = cifar.batches_of(*cifar.load_images("test", chosen), batch_size=250)
        calibration = cifar.batches_of(*cifar.calibration_set(20 if quick else 100))
        model = cifar.trained(name)
        others, _ = cifar.load_images("train", cifar.drawn(100, seed=1, but=cifar.drawn(100)))
        measure = partial(cifar.accuracy, batches=test)
        return Workload(model, calibration, measure, others.split(250), writers(model))
    if name in TASKS:
        return of_task(TASKS[name]())
    model = DIGITS[name][0]().eval()
    model.load_state_dict(torch.load(weights / f"{name}.pt", weights_only=True))
    (images, labels), held_out = digits(name)
    measure = partial(cifar.accuracy, batches=cifar.batches_of(*held_out))
    return Workload(model, cifar.batches_of(images, labels), measure, [], writers(model))


def of_task(task: Task) -> Workload:
    """A real network; language models come down to shares of their parameters."""
    cost = "params" if task.unit == "perplexity" else "macs"
    return Workload(task.model, task.calibration, task.measure, task.fresh, loss=task.loss, unit=task.unit, cost=cost)


def writers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that write to the residual stream; none in a plain stack."""
    if isinstance(model, cifar.CifarResNet):
        return ("conv1", *(name for name, _ in model.named_modules() if name.endswith(".conv2")))
    if isinstance(model, SmallViT):
        return ("embed", *(name for name, _ in model.named_modules() if name.endswith((".out", ".mlp2"))))
    return ()


def digits(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and labels of the training split and of the third that is held out, in the form that the model takes."""
    data = load_digits()
    images = torch.from_numpy(data.images).float() / 8 - 1
    parts = train_test_split(images, torch.from_numpy(data.target), test_size=1 / 3, random_state=0)
    train, test, train_labels, test_labels = parts
    form = DIGITS[name][1]
    return (form(train), train_labels), (form(test), test_labels)


def train_digits(name: str, weights: Path, *, epochs: int = 60) -> None:
    """Train the named model on its training split, seeded, and leave its weights in the folder `weights`."""
    torch.manual_seed(0)
    model = DIGITS[name][0]().train()
    (images, labels), _ = digits(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    torch.save(model.state_dict(), weights / f"{name}.pt")


def tune(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The short training that all methods share: SGD, rate falling to zero, flips and shifts by up to 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), TUNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = TUNING_EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(TUNING_EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(varied(images[chosen], generator)), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, 32, 32), half of them mirrored, each shifted by up to 4 pixels."""
    n, size = len(images), images.shape[-1]
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    padded, shifts = F.pad(images, (4, 4, 4, 4)), torch.randint(9, (n, 2), generator=generator).tolist()
    return torch.stack([padded[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(shifts)])


def tuning_set(*, quick: bool) -> tuple[Tensor, Tensor]:
    """The images of the short training: training images, class-balanced, drawn with a seed of their own."""
    return cifar.calibration_set(20 if quick else TUNING_IMAGES, seed=1)


@torch.no_grad()
def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one input: of matrix products and convolutions, by torch's flop counter.

    Recurrent layers are run without their fused kernels, which the counter does not know.
    """
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(example[:1])
    return counter.get_total_flops() // 2


def params(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding(model: nn.Module) -> int:
    """The number of entries of its embeddings."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
