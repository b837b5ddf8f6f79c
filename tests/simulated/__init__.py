"""A device to test placement on where there is no GPU: `pytest -p simulated` makes it, under the name "simulated".

It refuses operands of several devices, as a GPU does, and the CPU computes for it. How a GPU rounds, and which kernels
it has, is not simulated, and weights that are shared are shared no more once a model has been moved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.cpp_extension import load

NAME = "simulated"
KERNELS: dict[str, Callable[..., Any]] = {"convolution_overrideable": torch.ops.aten.convolution}
LIBRARY = torch.library.Library("aten", "IMPL")


def pytest_configure() -> None:
    """Build the device and register it with torch, for the rest of this process."""
    with tempfile.TemporaryDirectory() as folder:
        load("simulated_device", [str(Path(__file__).with_name("device.cpp"))], build_directory=folder)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _backend())
    torch.utils.generate_methods_for_privateuse1_backend()
    for name, function in KERNELS.items():
        LIBRARY.impl(name, _on_cpu(function), "PrivateUse1")


def _backend() -> ModuleType:
    """What torch looks for under torch.simulated."""
    backend: Any = ModuleType(f"torch.{NAME}")
    backend.is_available = lambda: True
    backend.device_count = lambda: 1
    backend.current_device = lambda: 0
    backend._is_in_bad_fork = lambda: False
    backend.manual_seed_all = backend.set_device = backend.synchronize = lambda *_: None
    backend.get_rng_state = lambda *_: torch.get_rng_state()
    backend.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    return backend


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors of the device that gives tensors there, made of a function of tensors of the CPU."""

    def computed(*args: Any) -> Any:
        found = function(*pytree.tree_map_only(Tensor, Tensor.cpu, args))
        return pytree.tree_map_only(Tensor, lambda t: t.to(NAME), found)

    return computed


def kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that computes an operation of which the CPU has no kernel by this name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[name] = function
        return function

    return register


@kernel("convolution_backward_overrideable")
def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    """Gradients of input, weight and bias; `options` end in transposition, its padding, groups, what is wanted."""
    transposed, groups = options[3], options[5]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return torch.ops.aten.convolution_backward(grad, x, weight, [channels], *options)


@kernel("_thnn_fused_lstm_cell")
def lstm_cell(x: Tensor, h: Tensor, cx: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """The next states, and the gates for the backward pass, from what input and state contribute to the gates."""
    i, f, g, o = sum((bias for bias in biases if bias is not None), x + h).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


@kernel("_thnn_fused_lstm_cell_backward_impl")
def lstm_cell_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, cx: Tensor, cy: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, ...]:
    """Gradients of the gates, the earlier state and the biases."""
    i, f, g, o = gates.chunk(4, 1)
    grad_h, grad_c = (torch.zeros_like(cy) if grad is None else grad for grad in (grad_h, grad_c))
    down = grad_h * o * (1 - cy.tanh().square()) + grad_c
    parts = down * g * i * (1 - i), down * cx * f * (1 - f), down * i * (1 - g * g), grad_h * cy.tanh() * o * (1 - o)
    grads = torch.cat(parts, 1)
    return grads, down * f, grads.sum(0) if has_bias else torch.empty(0)


@kernel("_thnn_fused_gru_cell")
def gru_cell(x: Tensor, h: Tensor, hx: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """The next state, and what the backward pass needs, from what input and state contribute to the gates."""
    (xr, xz, xn), (hr, hz, hn) = ((a if b is None else a + b).chunk(3, 1) for a, b in zip((x, h), biases, strict=True))
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


@kernel("_thnn_fused_gru_cell_backward")
def gru_cell_backward(grad: Tensor, kept: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    """Gradients of both contributions, the earlier state and both biases."""
    r, z, n, hx, hn = kept.chunk(5, 1)
    of_n, of_z = grad * (1 - z) * (1 - n * n), grad * (hx - n) * z * (1 - z)
    of_r = of_n * hn * r * (1 - r)
    x, h = torch.cat([of_r, of_z, of_n], 1), torch.cat([of_r, of_z, of_n * r], 1)
    biases = (x.sum(0), h.sum(0)) if has_bias else (torch.empty(0), torch.empty(0))
    return x, h, grad * z, *biases
