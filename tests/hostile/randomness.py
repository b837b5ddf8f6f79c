"""Forwards that draw random numbers: torch's stay random in the graph, and no draw of the example's is a constant."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, hostile, middles

KIND = "programs"


OF_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_of_constant_sizes": lambda x: x * torch.rand(1, 8, 1, 1),
    "randn_of_the_shape": lambda x: x + torch.randn(x.shape) * 0.1,
    "randn_like": lambda x: x + torch.randn_like(x) * 0.1,
    "normal_of_tensors": lambda x: torch.normal(x.detach(), 0.1),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((1, 8, 1, 1), 0.7)),
    "randperm_of_positions": lambda x: x[:, :, torch.randperm(8)],
    "multinomial": lambda x: x * torch.multinomial(torch.ones(8), 8).float().view(1, 8, 1, 1),
    "gumbel": lambda x: x * F.gumbel_softmax(x.flatten(2), dim=-1).view_as(x),
    "dropout": lambda x: F.dropout(x, 0.4, training=True),
    "dropout_of_channels": lambda x: F.dropout2d(x, 0.4, True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "stochastic_depth": lambda x: x + x.tanh() * (torch.rand(x.shape[0], 1, 1, 1) < 0.5),
    "seeded_generator": lambda x: x * torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(3)),
    "seed_in_the_forward": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x))) * 0.1,
    "seeded_by_itself": lambda x: x * (torch.manual_seed(5), torch.rand(8, 1, 1))[1],
    "distribution_of_the_input": lambda x: torch.distributions.Normal(x, 0.1).rsample(),
}
middles(KIND, {f"random_{name}": function for name, function in OF_TORCH.items()}, wanted="any")


OF_PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "python_number": lambda x: x * random.random(),
    "python_branch": lambda x: x * 2 if random.random() < 0.5 else x,
    "python_shuffle": lambda x: torch.cat(random.sample(list(x.chunk(4, 1)), 4), 1),
    "numpy_number": lambda x: x * float(np.random.rand()),
    "numpy_fresh": lambda x: x * float(np.random.default_rng().random()),
    "clock": lambda x: x * (time.perf_counter_ns() % 1000 / 1000 + 0.1),
    "torch_number": lambda x: x * torch.rand(()).item(),
    "torch_branch": lambda x: x * 2 if torch.rand(1) < 0.5 else x,
}
middles(KIND, {f"random_{name}": function for name, function in OF_PYTHON.items()}, wanted="said")
middles(
    KIND,
    {
        "fixed_numpy_generator": lambda x: x * float(np.random.default_rng(0).random()),
        "fixed_clock": lambda x: x * (2 if time.time() > 0 else 1),
    },
)


@hostile(KIND, wanted="said")
class GeneratorOfItsOwn(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def between(self, x: Tensor) -> Tensor:
        return x + torch.randn(8, 1, 1, generator=self.generator)


@hostile(KIND, wanted="any")
class DropoutThatStays(Net):
    """Monte Carlo dropout: its mode does not follow the model's."""

    def __init__(self) -> None:
        super().__init__(drop=nn.Dropout(0.4))

    def between(self, x: Tensor) -> Tensor:
        return self.drop.train()(x)


@hostile(KIND, wanted="any")
class DropoutOfASubclass(Net):
    def __init__(self) -> None:
        class Always(nn.Dropout):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, self.p, True)

        super().__init__(drop=Always(0.4))

    def between(self, x: Tensor) -> Tensor:
        return self.drop(x)


@hostile(KIND, wanted="any")
class ModeOfItsOwn(Net):
    """`eval` does nothing to a part of the model."""

    def __init__(self) -> None:
        class Stays(nn.Dropout):
            def train(self, mode: bool = True) -> Any:
                return super().train(True)

        super().__init__(drop=Stays(0.4))

    def between(self, x: Tensor) -> Tensor:
        return self.drop(x)
