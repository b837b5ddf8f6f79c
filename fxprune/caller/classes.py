"""Ready-made `classes=` for targets that are not class numbers: regressions, masks, and the next tokens of texts.

Each is a function of the targets, or makes one. A sample or position with a negative class is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.caller.arguments import is_whole, shown
from fxprune.caller.batches import Classes, Unpack, batches
from fxprune.caller.example import check_dense
from fxprune.errors import CalibrationError, a_kind, blaming, error_text

Values = Callable[[Any], Tensor]


def bins(edges: Sequence[float] | Tensor, *, of: Values | None = None) -> Classes:
    """Bins of a regression's targets between given edges.

    Args:
        edges: the k inner edges of k + 1 bins, rising. A target that equals an edge is in the bin above it.
        of: callable(targets) -> the numbers to bin, where the targets are not one number for each sample or position.

    Returns:
        A function from targets (N,), (N, 1) or (N, *positions) to bins, (N,) or (N, *positions); NaN gives -1.

    >>> bins([0.0, 10.0])(torch.tensor([-3.0, 0.0, 4.0, 12.0]))
    tensor([0, 1, 1, 2])
    """
    try:
        inner = torch.as_tensor(edges, dtype=torch.float64).cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        text = error_text(error)
        raise CalibrationError(f"the edges of bins are no numbers ({text}): give rising finite ones") from error
    if inner.ndim != 1 or not len(inner) or not bool(inner.isfinite().all()) or bool((inner.diff() <= 0).any()):
        raise CalibrationError(f"the edges of bins are {inner.tolist()}: give one or more rising finite numbers")
    return partial(_binned, edges=inner, of=of)


def quantile_bins(
    loader: Iterable[Any], count: int = 4, *, of: Values | None = None, unpack: Unpack | None = None
) -> Classes:
    """`count` bins of a regression's targets with about equally many targets of a loader in each.

    There are fewer bins where some targets occur often. `of` is as in `bins`, `unpack` as in `score`.

    Raises:
        CalibrationError: the targets are not numbers, or are all equal.

    >>> loader = [(torch.zeros(4, 3), torch.tensor([1.0, 2.0, 30.0, 40.0]))]
    >>> quantile_bins(loader, count=2)(torch.tensor([0.0, 15.0, 17.0]))
    tensor([0, 0, 1])
    """
    _at_least_two(count, "count")
    values = np.concatenate([_numbers(targets, of).flatten().numpy() for _, targets in batches(loader, unpack)])
    values = values[np.isfinite(values)]
    edges = np.unique(np.quantile(values, np.arange(1, count) / count)) if len(values) else values
    edges = edges[edges > values.min()] if len(edges) else edges
    if not len(edges):
        raise CalibrationError(
            f"the {len(values)} finite targets of the loader fall into one bin: there are no classes to compare; look "
            "at the targets, or give bins() the edges"
        )
    return bins(edges.tolist(), of=of)


def majority_class(ignore: int = 255) -> Classes:
    """The most frequent class of each mask: targets (N, H, W) -> (N,); pixels of the class `ignore` are ignored.

    >>> majority_class()(torch.tensor([[[3, 3], [255, 255]], [[255, 255], [255, 255]]]))
    tensor([ 3, -1])
    """
    return partial(_majority_without, ignore=ignore)


def each_position(ignore: int = 255) -> Classes:
    """The targets themselves, a class for each position: masks (N, H, W), tags (N, T); `ignore` is ignored.

    >>> each_position()(torch.tensor([[0, 2, 255]]))
    tensor([[ 0,  2, -1]])
    """
    return partial(_without, ignore=ignore)


def frequency_bins(
    source: Iterable[Any] | Tensor, bins: int = 8, *, shift: bool = True, ignore: int = -100,
    unpack: Unpack | None = None,
) -> Classes:  # fmt: skip
    """Frequency bins of the next token, for language models: bin 0 holds the most frequent tokens.

    The tokens are sorted by frequency and divided into bins with about equally many occurrences.

    Args:
        source: a loader whose targets are tokens, (N, T), or the number of occurrences of each token, (vocabulary,).
        bins: the number of bins.
        shift: True for targets that are the input tokens: each position has the bin of the token after it, and the
            last position none. False for targets that are shifted already: each position has the bin of its target.
        ignore: a token that is ignored, such as padding; negative tokens are ignored, too.
        unpack: as in `score`.

    Returns:
        A function from targets (N, T) to bins (N, T). A token beyond those counted is in the last bin.

    >>> classes = frequency_bins(torch.tensor([50, 30, 20]), bins=2)
    >>> classes(torch.tensor([[0, 0, 2, 1, 7]]))
    tensor([[ 0,  1,  1,  1, -1]])
    """
    _at_least_two(bins, "bins")
    counts = (source if isinstance(source, Tensor) else _occurrences(source, unpack, ignore)).cpu().double()
    if counts.ndim != 1 or not bool((counts > 0).any()) or bool((counts < 0).any()):
        raise CalibrationError(
            f"the occurrences of tokens have shape {tuple(counts.shape)} and sum {float(counts.sum()):g}: give one "
            "count for each token of the vocabulary, or a loader whose targets are tokens"
        )
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    table = torch.empty(len(counts) + 1, dtype=torch.int64)
    table[order] = (before / counts.sum() * bins).long().clamp(max=bins - 1)
    table[-1] = bins - 1
    return partial(_frequency, table=table, shift=shift, ignore=ignore)


def _at_least_two(count: int, name: str) -> None:
    if not is_whole(count, 2, 1 << 31):
        raise CalibrationError(f"{name} is {shown(count)}: the U-Score compares at least two classes")


def _numbers(targets: Any, of: Values | None) -> Tensor:
    """The numbers to bin, in float64 on the CPU: (N,) or (N, *positions)."""
    with blaming("of=", "the targets of a batch"):
        values: Any = of(targets) if of else targets
    check_dense(values, "what of= gives" if of else "a batch's targets", CalibrationError, strided=True)
    if not isinstance(values, Tensor) or values.is_complex() or not values.ndim:
        what = f"have shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"are {a_kind(values)}"
        raise CalibrationError(
            f"the targets {what}, not a number a sample: pass of=, a function that takes it from them"
        )
    numbers: Tensor = values.detach().to("cpu", torch.float64)
    return numbers[:, 0] if numbers.ndim == 2 and numbers.shape[1] == 1 else numbers


def _binned(targets: Any, *, edges: Tensor, of: Values | None) -> Tensor:
    values = _numbers(targets, of)
    return torch.where(values.isnan(), -1, torch.bucketize(values, edges, right=True))


def _without(targets: Tensor, *, ignore: int) -> Tensor:
    return torch.where(targets == ignore, -1, targets.long())


def _majority_without(targets: Tensor, *, ignore: int) -> Tensor:
    return majority(_without(targets, ignore=ignore))


def _occurrences(loader: Iterable[Any], unpack: Unpack | None, ignore: int) -> Tensor:
    """How often each token occurs in the targets of a loader: (largest token + 1,)."""
    total = torch.zeros(0, dtype=torch.int64)
    for _, targets in batches(loader, unpack):
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            dtype = f" of {targets.dtype}" if isinstance(targets, Tensor) else ""
            raise CalibrationError(
                f"the targets are {a_kind(targets)}{dtype}, not a tensor of tokens: pass unpack=, such as "
                "lambda batch: (batch, batch['input_ids'])"
            )
        tokens = targets.cpu().flatten()
        found = torch.bincount(tokens[(tokens >= 0) & (tokens != ignore)], minlength=len(total))
        found[: len(total)] += total
        total = found
    return total


def _frequency(targets: Tensor, *, table: Tensor, shift: bool, ignore: int) -> Tensor:
    tokens = targets.cpu()
    wanted = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1) if shift else tokens
    found = table[wanted.clamp(0, len(table) - 1)]
    return torch.where((wanted < 0) | (wanted == ignore), -1, found)


def majority(classes: Tensor) -> Tensor:
    """The class of most positions of each sample: (samples, *positions) -> (samples,), the lowest of equals.

    Negative classes are ignored; a sample without others gets -1.

    >>> majority(torch.tensor([[2, 2, 5], [-1, -1, 3], [-1, -1, -1]]))
    tensor([ 2,  3, -1])
    """
    flat = classes.flatten(1)
    present, inverse = torch.unique(flat, return_inverse=True)
    if not flat.numel():
        return flat.new_full((len(flat),), -1)
    counts = torch.zeros(len(flat), len(present), dtype=torch.int64)
    counts.scatter_add_(1, inverse, torch.ones_like(inverse))
    counts[:, present < 0] = 0
    best = counts.argmax(1)
    return torch.where(counts.amax(1) > 0, present[best], -1)
