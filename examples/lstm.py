"""A recurrent network that reads an image row by row: the hidden units of an LSTM in two directions.

python examples/lstm.py        (needs pip install '.[demo]')
"""

from __future__ import annotations

import torch
from digits import accuracy, digits, loader_of, train
from torch import Tensor, nn

import fxprune


class RowReader(nn.Module):
    """An LSTM over the 8 rows of an image, and a linear layer on the mean of its outputs."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 1, 8, 8) to logits (n, 10)."""
        logits: Tensor = self.head(self.lstm(x.squeeze(1))[0].mean(1))
        return logits


def main() -> None:
    """Train, then prune at four budgets from the same scores."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    loader = loader_of(train_set)
    model = RowReader()
    train(model, loader, epochs=25)
    print(f"original: {model.lstm.hidden_size} units, accuracy {accuracy(model, test_set):.3f}")

    scores = fxprune.score(model, loader)
    for share in (0.8, 0.6, 0.4, 0.2):
        small = fxprune.apply(model, scores.plan(params=share), scores=scores, loader=loader, compensate="sequential")
        units = small.get_submodule("lstm").hidden_size
        print(f"{share:.0%} of the parameters: {units} units, accuracy {accuracy(small, test_set):.3f}")


if __name__ == "__main__":
    main()
