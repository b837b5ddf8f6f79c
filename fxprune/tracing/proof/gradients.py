"""Whether a graph trains as its model does: both have the same gradients, as far as rounding shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_fields, copied
from fxprune.caller.isolation import attributes_restored, evaluating
from fxprune.tracing.facts import placeholder_values
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.proof.trials import Original, run_under_seed

_APART = {torch.float16: 0.2, torch.bfloat16: 0.5}  # how far, of its norm, the gradient of a tensor may be off
_NOISE = 1e-4  # of the largest norm: a smaller gradient may be rounding, as that of a bias before a softmax
_LARGE, _MOST = 1 << 20, 1 << 24  # numbers of a parameter, and of all together


def other_gradients(original: Original, graph: ModelGraph, batch: Any) -> list[str]:
    """The names of parameters, and "its input", whose gradients in the graph differ from the model's.

    The loss is the sum of the outputs, each times a random number. Nothing is compared where the model has no backward.
    """
    own, held = original.model, dict(graph.named_parameters(remove_duplicate=False))
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad and name in held}
    most = _MOST if sum(p.numel() for p in trained.values()) <= _MOST else _LARGE
    names = [name for name, p in trained.items() if p.numel() <= most]
    if not names:
        return []
    try:
        with original.restored():
            wanted = _gradients(own, names, batch, lambda x: _call(original, x))
    except Exception:  # noqa: BLE001 - the model's own backward fails, such as that of cuDNN's recurrent layers
        return []
    try:
        with evaluating(graph), attributes_restored(graph):
            found = _gradients(graph, names, batch, lambda x: graph.forward(*placeholder_values(graph, x)))
    except Exception:  # noqa: BLE001 - such as operations in place on what the backward needs
        return names
    largest = max((_norm(gradient) for gradient in wanted if gradient is not None), default=0.0)
    pairs = zip([*names, *["its input"] * len(wanted)], wanted, found, strict=False)
    return list(dict.fromkeys(name for name, one, other in pairs if _differ(one, other, _NOISE * largest)))


def _call(original: Original, batch: Any) -> Any:
    args, kwargs = original.arguments(copied(batch))
    return original.model(*args, **kwargs)


def _gradients(model: nn.Module, names: list[str], batch: Any, call: Callable[[Any], Any]) -> list[Tensor | None]:
    """The gradients of the named parameters, and of the floating tensors of a batch."""
    held = dict(model.named_parameters(remove_duplicate=False))
    leaves, spec = pytree.tree_flatten(batch)
    inputs = [_leaf(leaf) for leaf in leaves]
    sought = [*(held[name] for name in names), *(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)]

    def run() -> tuple[Tensor | None, ...]:
        given = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
        outputs = pytree.tree_leaves(as_fields(call(pytree.tree_unflatten(given, spec))))
        torch.manual_seed(0)
        loss = sum((o * torch.randn_like(o)).sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
        if not isinstance(loss, Tensor):
            return (None,) * len(sought)
        return torch.autograd.grad(loss, sought, allow_unused=True)

    return list(run_under_seed(run, (), {}, grad=True))


def _leaf(value: Any) -> Any:
    """A copy of a floating tensor that requires a gradient; anything else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def _real(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor of real numbers that torch computes with."""
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    parts = torch.view_as_real(dense) if dense.is_complex() else dense
    return parts.float() if parts.itemsize == 1 else parts


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(torch.linalg.vector_norm(_real(gradient), dtype=torch.float64))


def _differ(wanted: Tensor | None, found: Tensor | None, noise: float) -> bool:
    """Whether two gradients differ by more than rounding, or only one of them is there."""
    if wanted is None or found is None:
        return _norm(wanted) != _norm(found)
    error, scale = _norm(_real(found) - _real(wanted)), max(_norm(wanted), noise)
    return error > _APART.get(wanted.dtype, 0.02) * scale
