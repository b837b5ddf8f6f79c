"""A network like ResNet-50 for images of 32 x 32, trained here on CIFAR-10, as no checkpoint of one is at hand.

It has ResNet-50's 16 bottlenecks (3, 4, 6 and 3), 3/16 of its widths, and a stem of one convolution.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import cifar
import torch
import torch.nn.functional as F
from measure import CONSOLE
from oneshot_models import Workload, varied
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

BATCH, RATE = 125, 0.1


def bottlenecks(widths: int = 24) -> ResNet:
    """The network, with fresh weights: 16 bottlenecks, whose outputs have 2 to 16 times `widths` channels.

    >>> bottlenecks()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    net = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=cifar.CLASSES)
    net.conv1, net.maxpool = nn.Conv2d(3, widths, 3, stride=2, padding=1, bias=False), nn.Identity()
    net.bn1, net.inplanes = nn.BatchNorm2d(widths), widths
    for number, (planes, blocks) in enumerate(zip((1, 2, 4, 8), (3, 4, 6, 3), strict=True), start=1):
        stage = net._make_layer(Bottleneck, planes * widths // 2, blocks, stride=1 if number == 1 else 2)
        setattr(net, f"layer{number}", stage)
    net.fc = nn.Linear(net.inplanes, cifar.CLASSES)
    return net


def train(net: nn.Module, epochs: int, *, quick: bool) -> None:
    """Train a network on all training images, flipped and shifted, with SGD under one cycle."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = cifar.calibration_set(20) if quick else cifar.load_images("train")
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    net.train().to(memory_format=torch.channels_last)  # trains faster
    for epoch in range(epochs):
        start, losses = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(images), generator=generator)[: steps // epochs * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(
                net(varied(images[chosen], generator).to(memory_format=torch.channels_last)), labels[chosen]
            )
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item() * BATCH / len(images)
        CONSOLE.print(f"epoch {epoch + 1} of {epochs}: loss {losses:.3f}, {time.perf_counter() - start:.0f} s")
    net.eval().to(memory_format=torch.contiguous_format)


def trained_bottlenecks(weights: Path, *, quick: bool) -> Workload:
    """The trained network with its calibration and test images; its weights are kept in the file `weights`."""
    net = bottlenecks().eval()
    if weights.is_file():
        net.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(net, 1 if quick else 15, quick=quick)
        torch.save(net.state_dict(), weights)
    test = cifar.batches_of(*cifar.load_images("test", range(0, 5000, 10) if quick else None), batch_size=250)
    calibration = cifar.batches_of(*cifar.calibration_set(20 if quick else 100))
    return Workload(net, calibration, partial(cifar.accuracy, batches=test), [])
