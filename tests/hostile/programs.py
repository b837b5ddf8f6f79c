"""Forwards that leave the tensors of eager mode: scripts, transforms, autograd, contexts, NumPy, random numbers."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hostile.case import conv, middle, middles, with_layers

KIND = "programs"


# -- scripts -----------------------------------------------------------------------------------------------------------


def fused(a: Tensor) -> Tensor:
    return torch.tanh(a) * torch.sigmoid(a)


def branching(a: Tensor) -> Tensor:
    if bool(a.mean() > 0.0):
        return a * 2
    return a * 3


scripted = functools.cache(torch.jit.script)


@functools.cache
def traced() -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(fused, torch.ones(2, 8, 8, 8))


@torch.jit.ignore
def ignored(a: Tensor) -> Tensor:
    return fused(a)


JIT: dict[str, Callable[[Tensor], Tensor]] = {
    "jit_function": lambda x: scripted(fused)(x),
    "jit_traced_function": lambda x: traced()(x),
    "jit_ignored": lambda x: ignored(x) + x,
}
JIT_OF_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "jit_function_that_branches": lambda x: scripted(branching)(x),
    "jit_fork": lambda x: torch.jit.wait(torch.jit.fork(fused, x)),
}
middles(KIND, JIT)
middles(KIND, JIT_OF_VALUES, wanted="any")


@middle(KIND, wanted="any", layers=lambda: {"g": torch.jit.script(nn.Sequential(conv(8, 8), nn.ReLU()))})
def jit_module_with_weights(self: Any, x: Tensor) -> Tensor:
    return self.g(x)


# -- transforms --------------------------------------------------------------------------------------------------------


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap_over_samples": lambda x: torch.vmap(lambda z: z * z.mean())(x),
    "vmap_over_channels": lambda x: x * torch.vmap(lambda z: z.norm() / 10, in_dims=1)(x).view(1, -1, 1, 1),
    "func_grad": lambda x: torch.func.grad(lambda z: (z**3).sum() / 3)(x),
    "func_jvp": lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1],
    "func_per_sample_grad": lambda x: torch.vmap(torch.func.grad(lambda z: z.exp().mean()))(x),
    "func_jacobian": lambda x: x * torch.func.jacrev(lambda s: s**2)(x.mean((1, 2, 3))).diagonal().view(-1, 1, 1, 1),
}
middles(KIND, TRANSFORMS, wanted="any")


@middle(KIND, layers=lambda: {"g": conv(8, 8)}, wanted="any")
def func_functional_call(self: Any, x: Tensor) -> Tensor:
    halved = {name: value * 0.5 for name, value in self.g.named_parameters()}
    return torch.func.functional_call(self.g, halved, (x,))


# -- autograd and contexts ---------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _gradient_of_itself(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((z**3).sum(), z)
    return x + slope * 0.1


def _slope_by_backward(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (z**2).sum().backward()
    return x + z.grad


def _largest(x: Tensor) -> Tensor:
    return x.detach().abs().amax((1, 2, 3), keepdim=True)


def _within(context: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with context:
        return function(x)


def _another_dtype(x: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ramp = torch.linspace(0, 1, 8)
    finally:
        torch.set_default_dtype(before)
    return (x * ramp).to(x.dtype)


class Doubles(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * (2 if func is torch.relu else 1)


AUTOGRAD: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd_straight_through": Straight.apply,
    "autograd_of_itself": _gradient_of_itself,
    "autograd_backward_inside": _slope_by_backward,
    "context_no_grad": lambda x: x / _within(torch.no_grad(), _largest, x),
    "context_inference_mode": lambda x: x / _within(torch.inference_mode(), _largest, x).clone(),
    "context_autocast": lambda x: x + _within(torch.autocast("cpu", torch.bfloat16), lambda x: x @ x.mT, x).float(),
    "context_default_dtype": _another_dtype,
    "context_checkpoint": lambda x: checkpoint(fused, x, use_reentrant=False),
    "context_saved_on_cpu": lambda x: _within(torch.autograd.graph.save_on_cpu(), lambda x: x * x.sigmoid(), x),
    "context_another_device": lambda x: x * _within(torch.device("cpu"), lambda x: torch.linspace(0.5, 1, 8), x),
    "context_a_function_mode": lambda x: _within(Doubles(), torch.relu, x),
}
middles(KIND, AUTOGRAD, wanted="any")


# -- NumPy and Python --------------------------------------------------------------------------------------------------


def _pooled(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(fused, [x, -x]))  # type: ignore[return-value]


PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy_round_trip": lambda x: x * torch.from_numpy(np.tanh(x.detach().numpy())),
    "numpy_index": lambda x: x[:, np.argsort(x.detach().numpy().mean((0, 2, 3)))],
    "tolist": lambda x: x * torch.tensor(x.detach().mean((1, 2, 3)).tolist()).view(-1, 1, 1, 1),
    "python_sum": lambda x: x + sum(row.mean() for row in x) / len(x),
    "dlpack": lambda x: x * torch.from_dlpack(x.detach()).sigmoid(),
    "aten": lambda x: torch.ops.aten.mul.Tensor(torch.ops.aten.relu(x), 2),
    "thread_pool": _pooled,
}
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy_constant": lambda x: x * torch.from_numpy(np.linspace(0.5, 1, 8, dtype=np.float32)),
    "numpy_sizes": lambda x: x / float(np.prod(x.shape[2:])),
    "torch_c": lambda x: torch._C._nn.gelu(x),
    "python_map": lambda x: torch.cat([*map(torch.tanh, x.chunk(4, 1))], 1),
    "generator": lambda x: torch.cat([part * part.mean() for part in (y + 1 for y in x.split(2, 1))], 1),
    "fixed_numpy_generator": lambda x: x * float(np.random.default_rng(0).random()),
    "fixed_clock": lambda x: x * (2 if time.time() > 0 else 1),
}
middles(KIND, PYTHON, wanted="any")
middles(KIND, EXACT)


# -- random numbers: torch's stay random in the graph, and no draw of the example's is a constant ----------------------

OF_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_of_the_shape": lambda x: x + torch.randn(x.shape) * 0.1,
    "randn_like": lambda x: x + torch.randn_like(x) * 0.1,
    "normal_of_tensors": lambda x: torch.normal(x.detach(), 0.1),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((1, 8, 1, 1), 0.7)),
    "randperm_of_positions": lambda x: x[:, :, torch.randperm(8)],
    "multinomial": lambda x: x * torch.multinomial(torch.ones(8), 8).float().view(1, 8, 1, 1),
    "gumbel": lambda x: x * F.gumbel_softmax(x.flatten(2), dim=-1).view_as(x),
    "dropout_of_channels": lambda x: F.dropout2d(x, 0.4, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "stochastic_depth": lambda x: x + x.tanh() * (torch.rand(x.shape[0], 1, 1, 1) < 0.5),
    "seeded_generator": lambda x: x * torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(3)),
    "seeded_by_itself": lambda x: x * (torch.manual_seed(5), torch.rand(8, 1, 1))[1],
    "distribution_of_the_input": lambda x: torch.distributions.Normal(x, 0.1).rsample(),
}
OF_PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "python_number": lambda x: x * random.random(),
    "python_branch": lambda x: x * 2 if random.random() < 0.5 else x,
    "numpy_number": lambda x: x * float(np.random.rand()),
    "numpy_fresh": lambda x: x * float(np.random.default_rng().random()),
    "clock": lambda x: x * (time.perf_counter_ns() % 1000 / 1000 + 0.1),
    "torch_number": lambda x: x * torch.rand(()).item(),
    "torch_branch": lambda x: x * 2 if torch.rand(1) < 0.5 else x,
    "item": lambda x: x * x.detach().abs().max().item(),
    "numpy_statistic": lambda x: x / float(np.abs(x.detach().numpy()).max()),
}
middles(KIND, {f"random_{name}": function for name, function in OF_TORCH.items()}, wanted="any")
middles(KIND, {f"random_{name}": function for name, function in OF_PYTHON.items()}, wanted="said")


@middle(KIND, lambda: dict(generator=torch.Generator().manual_seed(0)), wanted="said")
def generator_of_its_own(self: Any, x: Tensor) -> Tensor:
    return x + torch.randn(8, 1, 1, generator=self.generator)


class Always(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, True)


class Stays(nn.Dropout):
    """`eval` does nothing to it."""

    def train(self, mode: bool = True) -> Any:
        return super().train(True)


DROPS: dict[str, Any] = {
    "dropout_that_stays": lambda self, x: self.drop.train()(x),
    "dropout_of_a_subclass": lambda self, x: self.always(x),
    "mode_of_its_own": lambda self, x: self.stays(x),
}
with_layers(KIND, lambda: dict(drop=nn.Dropout(0.4), always=Always(0.4), stays=Stays(0.4)), DROPS, wanted="any")
