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
from fxprune.capture import placeholder_values
from fxprune.isolation import evaluating


def parameters(model: nn.Module) -> int:
    """The number of entries of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _layer_flops(x: torch.Size, inputs: torch.Size, hidden: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of one recurrent layer, which has a weight for its inputs and one for its hidden units."""
    return _flops(x, [inputs, hidden])


def _flops(x: torch.Size, weights: list[torch.Size], *rest: Any, **kwargs: Any) -> int:
    """Flops of recurrent layers: every step of every sequence meets every matrix."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Flops of attention on the CPU, as torch counts them elsewhere."""
    return int(sdpa_flop_count(query, key, value))


_UNKNOWN_TO_TORCH = {
    torch.ops.aten.mkldnn_rnn_layer: _layer_flops,
    torch.ops.aten._cudnn_rnn: _flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def macs(model: Any, example: Any) -> int:
    """Multiply-accumulates of one sample of `example`, of matrix products and convolutions (torch's flop counter)."""
    with _counting(model) as counter:
        model(*placeholder_values(model, example))
    return int(counter.get_total_flops() // 2 // sample_count(example))


def flops(graph: fx.GraphModule, example: Any) -> dict[str, int]:
    """The flops of every node of `graph` on the whole of `example`; those of all are 2 macs a sample."""
    with _counting(graph) as counter:
        run = _NodeByNode(graph, counter)
        run.run(*placeholder_values(graph, example))
    return run.flops


class _NodeByNode(fx.Interpreter):
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
def _counting(model: Any) -> Iterator[FlopCounterMode]:
    """Count the flops of what runs inside, in eval mode."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with (
        torch.no_grad(),
        evaluating(model),
        FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter,
    ):
        try:
            for parameter in learned:
                parameter.requires_grad_(requires_grad=False)  # the counter fails on views of those with gradients
            yield counter
        finally:
            for parameter in learned:
                parameter.requires_grad_()
