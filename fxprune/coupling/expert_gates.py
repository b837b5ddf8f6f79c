"""Gates on the outputs of experts, where a tensor of numbers says which expert gave each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RoutedGate(nn.Module):
    """Puts a gate, made for (rows, experts), on the rows of the experts that were chosen.

    The gate is shown the size of each row in the column of its expert, and zeros in the others: how strongly the expert
    is used. The row is scaled as its size is.
    """

    def __init__(self, gate: nn.Module, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The gated `rows`: one for each entry of `chosen`, the numbers of their experts, in the same order.

        They may have one more axis, the width, and their other axes may be flattened.
        """
        numbers = chosen.reshape(-1, 1)
        flat = rows.reshape(len(numbers), -1)
        sizes = torch.linalg.vector_norm(flat.detach(), dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        spread = sizes.new_zeros(len(numbers), self.experts).scatter(1, numbers, sizes)
        left: Tensor = self.gate(spread).gather(1, numbers)
        gated: Tensor = (flat * (left / sizes)).reshape(rows.shape)
        return gated
