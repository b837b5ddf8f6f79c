"""Forwards that leave the tensors of eager mode: scripts, transforms, autograd, other contexts, NumPy and Python."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hostile.case import conv, middle, middles

KIND = "programs"


# -- scripts ---------------------------------------------------------------------------------------------------------


def fused(a: Tensor) -> Tensor:
    return torch.tanh(a) * torch.sigmoid(a)


def branching(a: Tensor) -> Tensor:
    if bool(a.mean() > 0.0):
        return a * 2
    return a * 3


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x


scripted = functools.cache(torch.jit.script)


@functools.cache
def traced() -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(fused, torch.ones(2, 8, 8, 8))


@torch.jit.ignore
def ignored(a: Tensor) -> Tensor:
    return fused(a)


@torch.jit.unused
def unused(a: Tensor) -> Tensor:
    return fused(a)


@middle(KIND, wanted="any")
def jit_function(self: Any, x: Tensor) -> Tensor:
    return scripted(fused)(x)


@middle(KIND, wanted="any")
def jit_function_that_branches(self: Any, x: Tensor) -> Tensor:
    return scripted(branching)(x)


@middle(KIND, wanted="any")
def jit_traced_function(self: Any, x: Tensor) -> Tensor:
    return traced()(x)


@middle(KIND, wanted="any", layers=lambda: {"act": torch.jit.script(Activation())})
def jit_module(self: Any, x: Tensor) -> Tensor:
    return self.act(x)


@middle(KIND, wanted="any", layers=lambda: {"g": torch.jit.script(nn.Sequential(conv(8, 8), nn.ReLU()))})
def jit_module_with_weights(self: Any, x: Tensor) -> Tensor:
    return self.g(x)


@middle(KIND)
def jit_ignored(self: Any, x: Tensor) -> Tensor:
    return ignored(x) + unused(-x)


@middle(KIND, wanted="any")
def jit_fork(self: Any, x: Tensor) -> Tensor:
    return torch.jit.wait(torch.jit.fork(fused, x))


# -- transforms ------------------------------------------------------------------------------------------------------


def _channels(x: Tensor) -> Tensor:
    return torch.vmap(lambda z: z.norm() / 10, in_dims=1)(x)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap_over_samples": lambda x: torch.vmap(lambda z: z * z.mean())(x),
    "vmap_over_channels": lambda x: x * _channels(x).view(1, -1, 1, 1),
    "vmap_of_two": lambda x: torch.vmap(torch.mul, in_dims=(0, None))(x, torch.linspace(0.5, 1, 8).view(8, 1, 1)),
    "func_grad": lambda x: torch.func.grad(lambda z: (z**3).sum() / 3)(x),
    "func_jvp": lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1],
    "func_vjp": lambda x: torch.func.vjp(torch.sin, x)[1](x)[0],
    "func_per_sample_grad": lambda x: torch.vmap(torch.func.grad(lambda z: z.exp().mean()))(x),
    "func_jacobian": lambda x: x * torch.func.jacrev(lambda s: s**2)(x.mean((1, 2, 3))).diagonal().view(-1, 1, 1, 1),
}
middles(KIND, TRANSFORMS, wanted="any")


@middle(KIND, layers=lambda: {"g": conv(8, 8)}, wanted="any")
def func_functional_call(self: Any, x: Tensor) -> Tensor:
    halved = {name: value * 0.5 for name, value in self.g.named_parameters()}
    return torch.func.functional_call(self.g, halved, (x,))


# -- autograd --------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * F.softplus(x).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t, s = F.softplus(x).tanh(), x.sigmoid()
        return grad * (t + x * s * (1 - t * t))


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


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax((1, 2, 3), keepdim=True)
    return x / scale


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = x.detach().abs().amax((1, 2, 3), keepdim=True)
    return x / scale.clone()


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.matmul(x, x.transpose(2, 3))
    return x + product.float()


def _no_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.float() * 2


def _another_dtype(x: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ramp = torch.linspace(0, 1, 8)
    finally:
        torch.set_default_dtype(before)
    return (x * ramp).to(x.dtype)


AUTOGRAD: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd_straight_through": Straight.apply,
    "autograd_mish": Mish.apply,
    "autograd_of_itself": _gradient_of_itself,
    "autograd_backward_inside": _slope_by_backward,
    "context_no_grad": _without_gradients,
    "context_inference_mode": _inference,
    "context_autocast": _autocast,
    "context_default_dtype": _another_dtype,
    "context_checkpoint": lambda x: checkpoint(fused, x, use_reentrant=False),
    "context_saved_on_cpu": lambda x: _within(torch.autograd.graph.save_on_cpu(), x),
}
middles(KIND, AUTOGRAD, wanted="any")


def _within(context: Any, x: Tensor) -> Tensor:
    with context:
        return x * x.sigmoid()


@middle(KIND, wanted="any")
def context_another_device(self: Any, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return x * torch.linspace(0.5, 1, 8)


@middle(KIND, wanted="any")
def context_a_function_mode(self: Any, x: Tensor) -> Tensor:
    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {})) * (2 if func is torch.relu else 1)

    with Doubles():
        return torch.relu(x)


# -- NumPy and Python ------------------------------------------------------------------------------------------------


def _ema(rows: list[Any]) -> list[float]:
    return list(itertools.accumulate((float(row.mean()) for row in rows), lambda a, b: 0.5 * a + 0.5 * b))


PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy_round_trip": lambda x: x * torch.from_numpy(np.tanh(x.detach().numpy())),
    "numpy_statistic": lambda x: x / float(np.abs(x.detach().numpy()).max()),
    "numpy_index": lambda x: x[:, np.argsort(x.detach().numpy().mean((0, 2, 3)))],
    "tolist": lambda x: x * torch.tensor(x.detach().mean((1, 2, 3)).tolist()).view(-1, 1, 1, 1),
    "item": lambda x: x * x.detach().abs().max().item(),
    "python_sum": lambda x: x + sum(row.mean() for row in x) / len(x),
    "python_map_and_reduce": lambda x: functools.reduce(operator.add, map(torch.tanh, x.chunk(4, 1))).repeat(
        1, 4, 1, 1
    ),
    "python_accumulate": lambda x: x * torch.tensor(_ema(list(x.detach()))).view(-1, 1, 1, 1),
    "dlpack": lambda x: x * torch.from_dlpack(x.detach()).sigmoid(),
    "numpy_constant": lambda x: x * torch.from_numpy(np.linspace(0.5, 1, 8, dtype=np.float32)),
    "numpy_sizes": lambda x: x / float(np.prod(x.shape[2:])),
    "aten": lambda x: torch.ops.aten.mul.Tensor(torch.ops.aten.relu(x), 2),
    "torch_c": lambda x: torch._C._nn.gelu(x),
}
SAID = ("item", "numpy_statistic")
EXACT = ("numpy_constant", "numpy_sizes", "torch_c", "python_map_and_reduce")
for _name, _function in PYTHON.items():
    middles(KIND, {_name: _function}, wanted="exact" if _name in EXACT else "said" if _name in SAID else "any")


@middle(KIND, wanted="any")
def thread_pool(self: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(fused, [x, -x]))  # type: ignore[return-value]


@middle(KIND)
def generator(self: Any, x: Tensor) -> Tensor:
    def parts() -> Any:
        for part in x.split(2, 1):
            yield part * part.mean()

    return torch.cat(list(parts()), 1)
