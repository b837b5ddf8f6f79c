"""What a user of the command line has: functions that give a model, and data for it."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.norm(self.body(x)).relu()).mean((2, 3)))


def build(width=12, classes=3, notes=None):
    print("a model that talks")
    return Net(width, classes)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Net(12, 3)

    def forward(self, x):
        return self.backbone(x if float(x.sum()) < 1e9 else -x)


model = Net(6, 3)
number = 3


def broken(width=1):
    raise OSError(f"no checkpoint of width {width}")


def dataset(count=60, classes=3):
    """Images of one colour a class, with noise; the last classes are rare."""
    torch.manual_seed(0)
    labels = torch.arange(count).sqrt().long() % classes
    images = torch.randn(count, 3, 8, 8)
    images[torch.arange(count), labels] += 2
    return TensorDataset(images, labels)


def loader(count=60, batch=20):
    return DataLoader(dataset(count), batch_size=batch)


def batches():
    return list(loader())


def dicts():
    return [{"image": images, "label": labels, "name": "x"} for images, labels in loader()]


def pair(batch):
    return batch["image"], batch["label"]


def same(batch):
    return tuple(batch)


def loss(output, target):
    return F.cross_entropy(output, target)


def run(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


def negative_loss(model, loader):
    with torch.no_grad():
        return -sum(float(F.cross_entropy(model(images), labels)) for images, labels in loader)


class Stuck:
    """A loader that gets stuck at its second batch, and says so."""

    def __iter__(self):
        yield batches()[0]
        Path("started").touch()
        time.sleep(600)


class Torn:
    """A loader that fails at its second batch."""

    def __iter__(self):
        yield batches()[0]
        raise ValueError("image 7 is cut off")


class Odd(nn.Module):
    """A model with an operation that has no rule."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.msort(self.stem(x)).mean((2, 3)))
