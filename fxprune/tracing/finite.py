"""Where NaN or infinity first appears in the values of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_fields
from fxprune.caller.isolation import evaluating


def spoiled(graph: fx.GraphModule, values: Sequence[Any]) -> str | None:
    """The input of a graph that is not finite, in words, where its outputs hold NaN or infinity; else None.

    (A mask may hold minus infinity, and so may logits.)
    """
    if all_finite(values):
        return None
    floats = floating_outputs(graph, values)
    return not_finite(graph, values) if any(bool((t.isnan() | t.isposinf()).any()) for t in floats) else None


def floating_outputs(graph: fx.GraphModule, values: Sequence[Any]) -> list[Tensor]:
    """The floating tensors among a graph's outputs in eval mode, on copies of the values of its placeholders."""
    return floats(outputs(graph, values))


def outputs(graph: fx.GraphModule, values: Sequence[Any]) -> Any:
    """A graph's outputs in eval mode, on copies of the values of its placeholders."""
    with torch.no_grad(), evaluating(graph):
        return graph(*pytree.tree_map_only(Tensor, torch.clone, list(values)))


def not_finite(graph: fx.GraphModule, values: Sequence[Any]) -> str | None:
    """The first value of a graph, run on values of its placeholders, that is not finite, in words; or None."""
    search = _Search(graph)
    with torch.no_grad():
        search.run(*values)
    if search.found is None:
        return None
    what = "the input" if search.found.op == "placeholder" else "the output of"
    return f"{what} {search.found.target} holds NaN or infinity"


class _Search(fx.Interpreter):
    """Runs a graph and remembers the first node whose value is not finite."""

    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and not all_finite(value):
            self.found = n
        return value


def all_finite(value: Any) -> bool:
    """Whether the floating tensors of a nested value hold only finite numbers."""
    return all(bool(torch.isfinite(t.coalesce().values() if t.is_sparse else t).all()) for t in floats(value))


def floats(value: Any) -> list[Tensor]:
    """The floating tensors of a nested value."""
    return [t for t in pytree.tree_leaves(as_fields(value)) if isinstance(t, Tensor) and t.is_floating_point()]
