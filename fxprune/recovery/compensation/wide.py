"""Layers too wide for least squares of their own: removed channels are predicted channel by channel from kept ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.coupling.readers import Reader, reader_of
from fxprune.recovery.compensation.aims import Aim
from fxprune.recovery.compensation.biases import bias_of, takes_bias
from fxprune.recovery.compensation.least_squares import STRENGTHS, Fit, Normal, Rows, best_fit
from fxprune.recovery.compensation.row_sampling import GraphPair, grid, picks_of, rows_for
from fxprune.scoring.moments import at_least_float32

MOST_CHANNELS = 4096
JUDGED = 4096  # rows by which the strength is chosen


@dataclass(frozen=True, slots=True, eq=False)
class _Channels:
    """The channels of a layer's inputs, each of `places` neighbouring features, and a mask of the `kept` ones."""

    places: int
    kept: Tensor


def by_channel(pair: GraphPair, node: fx.Node, reader: Reader, norm: nn.Module | None) -> Fit | None:
    """The original's weights, merged by the regression of its input channels on those that the layer has now.

    The same map holds for all places of a window, or of a map that was flattened. None where the layer has groups, more
    than 4096 channels, or channels that cannot be told apart.
    """
    original = reader_of(pair.whole.module, pair.whole.by_name[node.name])
    if original is None or original.groups > 1 or reader.groups > 1:
        return None
    channels = _channels(pair, node, reader)
    if channels is None:
        return None
    rows = _channel_rows(pair, node, reader, channels)  # before the original's layer runs, which drops its input
    judged = pair.rows(node, reader, Aim(node, norm), JUDGED)
    if rows is None or judged is None:
        return None
    matrix, masks = original.matrix().double(), pair.kept(node.name)
    if masks:
        matrix = matrix[:, masks[reader.channel_axis].to(matrix.device)]
    matrix = matrix.unflatten(2, (-1, channels.places)).flatten(3)  # (1, kept outputs, channels, places)
    weight, bias, fitting = reader.matrix().flatten(2).double(), bias_of(reader), rows.part(~rows.held)
    normal = Normal.of(fitting.inputs, fitting.wanted, intercept=takes_bias(reader, norm, new=pair.new_biases))
    selection = torch.eye(len(channels.kept), dtype=torch.float64, device=weight.device)[None, :, channels.kept]

    def solve(strength: float) -> tuple[Tensor, Tensor]:
        prediction, offset = normal.solve(selection, torch.zeros_like(selection[:, :, 0]), strength)
        moved = torch.einsum("gorp,grs->gosp", matrix, prediction).reshape(weight.shape)
        return moved, bias + torch.einsum("gorp,gr->go", matrix, offset)

    return best_fit(judged[0].part(judged[0].held), weight, bias, STRENGTHS, solve)


def _channels(pair: GraphPair, node: fx.Node, reader: Reader) -> _Channels | None:
    """The channels of the features that a layer reads."""
    masks = pair.kept(pair.source(pair.whole.by_name[node.name]).name)
    edge = next((edge for edge in pair.checker.coupling.edges if edge.consumer == node.name), None)
    kept = masks[reader.channel_axis] if masks else None
    if edge is None or kept is None or len(kept) != len(edge.units) or int(kept.sum()) != reader.matrix().shape[2]:
        return None
    places = 1
    if reader.windows is None:
        ends = np.flatnonzero(np.diff(edge.units, append=-2))
        places = math.gcd(*np.diff(ends, prepend=-1).tolist())
    kept = kept[::places].to(reader.weight.device)
    return _Channels(places, kept) if len(kept) <= MOST_CHANNELS else None


def _channel_rows(pair: GraphPair, node: fx.Node, reader: Reader, channels: _Channels) -> Rows | None:
    """Sampled input channels of the layer, and of the original at the same places."""
    source, original = pair.source(node), pair.source(pair.whole.by_name[node.name])
    given, wanted = pair.small.to(source), pair.whole.seen(original)
    if wanted is None or any(x.ndim != y.ndim for x, y in zip(given, wanted, strict=True)):
        return None
    axis = pair.samples_axis(original.name, reader, wanted[0])
    grids = [[_by_place(grid(v, reader, axis), channels.places) for v in values] for values in (given, wanted)]
    if any(x.shape[:2] != y.shape[:2] for x, y in zip(*grids, strict=True)):
        return None
    held = [
        pair.held(original.name, y, batch, reader, axis).repeat_interleave(channels.places, 1)
        for batch, y in enumerate(wanted)
    ]
    picks = picks_of([y.shape[:2] for y in grids[1]], pair.own(rows_for(len(channels.kept))), pair.generator)
    columns = (torch.cat([p.of(v) for p, v in zip(picks, values, strict=True)]) for values in (*grids, held))
    x, y, mask = (pair.data.gathered(column) for column in columns)
    none_or_all = bool(mask.all()) or not bool(mask.any())
    return None if none_or_all else Rows(at_least_float32(x)[None], at_least_float32(y)[None], mask[:, 0])


def _by_place(rows: Tensor, places: int) -> Tensor:
    """(first, n, channels x places) as (first, n x places, channels)."""
    spread: Tensor = rows.unflatten(2, (-1, places))
    return spread.movedim(3, 2).flatten(1, 2)
