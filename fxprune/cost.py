"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxprune.batches import sample_count
from fxprune.capture.passes import Shapes, on_shapes


def parameters(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _layer_flops(x: torch.Size, inputs: torch.Size, hidden: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of one recurrent layer, which has a weight for its inputs and one for its hidden units."""
    return _flops(x, [inputs, hidden])


def _flops(x: torch.Size, weights: list[torch.Size], *rest: Any, **kwargs: Any) -> int:
    """Flops of recurrent layers: every step of every sequence meets every matrix."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of attention, as torch counts them on other devices: those of its two matrix products."""
    return int(sdpa_flop_count(q, k, v))


FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _layer_flops,
    torch.ops.aten._cudnn_rnn: _flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}  # those that torch's counter does not have


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's formulas)."""
    with _frozen(model):
        return on_shapes(model, example, lambda inputs: _counted(model, inputs)) // 2 // sample_count(example)


def flops(graph: fx.GraphModule, example: Any) -> dict[str, int]:
    """The flops of every node of `graph` on the whole of `example`; those of all are 2 macs a sample."""
    with _frozen(graph):
        return on_shapes(graph, example, lambda inputs: _by_node(graph, inputs))


def _counted(model: Any, inputs: list[Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        Shapes(model).run(*inputs)
    return int(counter.get_total_flops())


def _by_node(graph: fx.GraphModule, inputs: list[Any]) -> dict[str, int]:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run = _NodeByNode(graph, counter)
        run.run(*inputs)
    return run.flops


class _NodeByNode(Shapes):
    """Runs a graph and reads the counter after every node."""

    def __init__(self, graph: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph)
        self.counter, self.flops, self.before = counter, dict[str, int](), 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        total = int(self.counter.get_total_flops())
        self.flops[n.name], self.before = total - self.before, total
        return value


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Take the gradients from the parameters for a while: the formulas fail on views of those that have them."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(requires_grad=False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()
