"""Choices, such as those of experts for a token: a trace is made as if some row had chosen each option.

A forward that skips options that no row has chosen is then traced in full. This is right, because an option without
rows adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import CaptureError
from fxprune.tracing.dependence import name_of, tensors_of

_PLACE_OF_DIM = {"topk": 2, "argmax": 1, "max": 1}  # among the arguments by position
MOST = 1024  # options; choices among more are left as they are


_SPREADS: ContextVar[bool] = ContextVar("whether choices are spread", default=True)


class ChoiceError(CaptureError):
    """A trace in which choices were spread over all options cannot be used.

    With `times` as many rows, it can. If `times` is 0, choices must be left as they are in the example.
    """

    def __init__(self, times: int = 0) -> None:
        super().__init__(
            f"the forward decides by what it chooses, and {times or 1} times as many samples show all of it"
        )
        self.times = times


@contextmanager
def as_made() -> Iterator[None]:
    """Leave choices as they are in the example."""
    token = _SPREADS.set(False)
    try:
        yield
    finally:
        _SPREADS.reset(token)


class Choices:
    """The choices of a trace, and the nodes that `follow` from their numbers alone, such as masks and counts.

    `values` are those of all nodes on the example, kept by the tracer. `short` is the factor on the number of rows that
    a choice needs for each option to be chosen, 1 if all are chosen. `decide` says that Python decides by a choice.
    """

    def __init__(self, values: Mapping[fx.Node, Any]) -> None:
        self.values = values
        self.follow: set[fx.Node] = set()
        self.short = 1
        self.decide = False

    def decided(self, node: fx.Node, *, length: bool = False) -> bool:
        """Whether Python, when it asks for the value of a node, decides by whether there are choices.

        Raises ChoiceError where it asks for the number of a chosen option.
        """
        if node not in self.follow:
            return False
        self.decide = True
        value = self.values[node]
        if not length and isinstance(value, Tensor) and value.dtype is not torch.bool:
            raise ChoiceError
        return True

    def check(self) -> None:
        """Raise ChoiceError where Python decides by choices that leave some out."""
        if self.decide and self.short > 1:
            raise ChoiceError(self.short)

    def spread(self, node: fx.Node, value: Any) -> Any:
        """The value of a new node; for a choice, one that chooses each at least once, where there are enough rows."""
        if self.follow.intersection(node.all_input_nodes) and _counts(value):
            self.follow.add(node)
        x, dim = self._chosen_from(node) if _SPREADS.get() else (None, 0)
        if x is None or not 1 < x.shape[dim] <= MOST:
            return value
        indices = value if isinstance(value, Tensor) else value[1]
        flat = indices if indices.ndim == x.ndim else indices.unsqueeze(dim)
        if flat.numel() < x.shape[dim]:
            self.short = max(self.short, -(-x.shape[dim] // max(flat.numel(), 1)))
        self.follow.add(node)
        numbers = torch.arange(flat.numel(), device=flat.device) % x.shape[dim]
        numbers = numbers.view(flat.movedim(dim, -1).shape).movedim(-1, dim)
        found = numbers.reshape(indices.shape)
        return found if indices is value else type(value)((x.gather(dim, numbers).reshape(indices.shape), found))

    def _chosen_from(self, node: fx.Node) -> tuple[Tensor | None, int]:
        """The tensor and the axis along which a node chooses the largest; None where it does not."""
        place = _PLACE_OF_DIM.get(name_of(node))
        x = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if place is None or not isinstance(x, Tensor) or not x.ndim or x.is_meta:
            return None, 0
        given = node.kwargs.get("dim", node.args[place] if len(node.args) > place else None)
        dim = -1 if given is None and place == 2 else given
        return (x, dim % x.ndim) if isinstance(dim, int) else (None, 0)


def _counts(value: Any) -> bool:
    """Whether a value consists of whole numbers and truths."""
    if isinstance(value, (bool, int)):
        return True
    tensors = tensors_of(value)
    return bool(tensors or isinstance(value, (list, tuple))) and not any(t.is_floating_point() for t in tensors)
