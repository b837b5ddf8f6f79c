"""The registry that every family adds itself to, and the few layers that most of them share."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.tracing.graph import ModelGraph

Inputs = Any  # a tensor, a tuple of tensors, or a dict of them: whatever the model's forward takes
CLASSES = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One small network and what pruning may and may not do to it.

    ``shrinks`` and ``frozen`` name modules or parameters: those that a strong plan must make narrower on their
    output side, and those whose outputs must stay whole under every plan.
    """

    build: Callable[[], nn.Module]
    example: Callable[..., Inputs]  # example(batch=2), and example(batch=2, size=...) where any_size
    shrinks: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    any_size: bool = False  # runs at other image sizes too
    any_batch: bool = True

    def scores(self, seed: int = 0) -> fxprune.Scores:
        """Random scores of the network, drawn once for all tests."""
        return _scores(self, seed)

    def plan(self, alpha: float) -> fxprune.Plan:
        """What these scores plan at `alpha`."""
        return self.scores().plan(alpha=alpha)

    def graph(self) -> ModelGraph:
        """The captured network, for all tests."""
        return _graph(self)

    def small(self, alpha: float) -> nn.Module:
        """What `apply` makes of the network by that plan, made once for all tests: copy it before it is changed."""
        return _small(self, alpha)


@functools.cache
def _scores(case: Case, seed: int) -> fxprune.Scores:
    return fxprune.Scores.random(_graph(case), case.example(2), seed=seed)


@functools.cache
def _graph(case: Case) -> ModelGraph:
    return fxprune.capture(case.build(), case.example(2))


@functools.cache
def _small(case: Case, alpha: float) -> nn.Module:
    return fxprune.apply(_graph(case), case.plan(alpha))


ZOO: dict[str, Case] = {}


def add(name: str, build: Callable[[], nn.Module], example: Callable[..., Inputs], **expectations: Any) -> None:
    """Register ``build`` under ``name``; its weights are drawn from a seed of its own."""
    if name in ZOO:
        raise ValueError(f"two cases are called {name}")
    ZOO[name] = Case(lambda: _built(name, build), example, **expectations)


def case(example: Callable[..., Inputs], **expectations: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class that needs no arguments, under its name in snake case."""

    def register(build: type[nn.Module]) -> type[nn.Module]:
        add(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", build.__name__).lower(), build, example, **expectations)
        return build

    return register


def _built(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        return randomise(build())


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every bias, affine parameter and running statistic a value of its own, so that a wrong index shows."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.uniform_(-0.5, 0.5)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.uniform_(-0.5, 0.5)
            elif name == "running_var":
                buffer.uniform_(0.5, 2.0)
    return model


def tensors(*shape: int) -> Callable[..., Tensor]:
    """Batches of seeded normal tensors of ``shape``."""

    def example(batch: int = 2) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))

    return example


def images(channels: int = 3, size: int = 8, dim: int = 2) -> Callable[..., Tensor]:
    """Batches of seeded images (signals where ``dim`` is 1, volumes where it is 3), ``size`` long on every side."""

    def example(batch: int = 2, size: int = size) -> Tensor:
        return tensors(channels, *[size] * dim)(batch)

    return example


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the image size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def head(channels: int, classes: int = CLASSES) -> nn.Sequential:
    """Global average pool and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
