"""Layers that are not opened: what they touch stays whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.rules.context import Context
from fxprune.rules.table import rule


@rule(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def recurrent(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Its hidden units are read by its own next step."""
    return ctx.opaque(f"{ctx.describe()} is recurrent, and kept whole", args, kwargs)
