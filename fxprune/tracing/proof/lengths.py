"""The lengths of a model's inputs at which its graph is fixed: at others, the graph gives other outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from fxprune.caller.example import leaves_of
from fxprune.caller.other_batches import Place, lengths_of, resized
from fxprune.tracing.agreement import difference
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.proof.trials import Original, run_graph

_CHEAP, _TIMES = 64, 4  # entries that are tried in all in any case; and how many times those of the example
_SINGLE = 4  # places of one length, at most, that are also changed one by one


def numbers_beside(size: int, ratios: Collection[float]) -> set[int]:
    """Sizes near which a forward may decide otherwise; `ratios` are those of `Captured`, or of products of two sizes.

    >>> sorted(numbers_beside(8, {2.0}))
    [10, 11, 12, 14, 15, 16, 17, 19]
    """
    at = {int(size * ratio) for ratio in ratios} | {math.isqrt(int(size * size * ratio)) for ratio in ratios}
    return {number + step for number in at for step in (-1, 0, 1, 3)}  # 3, where sizes were halved


def fixed_lengths(
    original: Original, graph: ModelGraph, example: Any, ratios: Collection[float]
) -> Iterator[tuple[Place, str]]:
    """The places in an example whose lengths are fixed in a graph without an error; each with the difference.

    A place is named where the model runs at another length, and the graph gives another output.
    Places of one length are changed together, and one by one, but then not to or from a length of one: such an input,
    say a mask beside words, is broadcast along the others, which is no other length. `ratios` are those of
    `numbers_beside`.
    """
    for size, places in lengths_of(example).items():
        alone = [[place] for place in places[:_SINGLE]] if len(places) > 1 < size else []
        for together in (places, *alone):
            least = 2 if together in alone else 1
            if found := _difference_at_other_lengths(original, graph, example, together, size, ratios, least):
                yield together[0], found
                break


def _difference_at_other_lengths(
    original: Original, graph: ModelGraph, example: Any, places: Sequence[Place], size: int, ratios: Any, least: int
) -> str | None:
    """The first difference between the outputs of a model and its graph at other lengths than `size`, in words."""
    taken = set[bool]()  # whether the model runs at a shorter length, and at a longer one
    for length, last in _lengths(example, size, ratios):
        if length < least or (last and (length > size) in taken):
            continue
        batch = resized(example, places, length)
        for trial in original.tried_afresh(batch, grads=(False,)):
            taken.add(length > size)
            try:
                found = run_graph(graph, trial)
            except Exception:  # noqa: BLE001, S112 - whatever the graph raises at a length that it does not take
                continue
            if differs := difference(trial.output, found):
                return f"with {length}, it gives other outputs than the model ({differs})"
    return None


def _lengths(example: Any, size: int, ratios: Collection[float]) -> Iterator[tuple[int, bool]]:
    """Other lengths to try: one more and half, and where the forward decides by sizes, further ones.

    Last, and marked as such, come lengths that many models with patches, windows or strides accept.
    """
    tensors = [leaf for leaf in leaves_of(example) if isinstance(leaf, Tensor)]
    on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors)
    if on_accelerator and not all(tensor.is_floating_point() for tensor in tensors):
        return  # an index out of range would end the process
    beside = sorted(numbers_beside(size, ratios), key=lambda length: abs(length - size))
    near = (size - 1, size + 2, 1, size + 3, 2 * size, 3 * size) if ratios else ()
    chosen: list[int] = []
    for lengths, most in (((size + 1, size // 2), math.inf), (beside, _TIMES * size), (near, max(_CHEAP, size))):
        tried: list[int] = []
        for length in lengths:
            allowed = 1 <= length <= (size if on_accelerator else math.inf)
            if allowed and length not in (size, *chosen) and length + sum(tried) <= most:
                tried.append(length)
        chosen += tried
    yield from ((length, False) for length in chosen)
    for times, parts in ((6, 7), (3, 4), (2, 3), (8, 7), (5, 4), (4, 3), (2, 1)):
        length, rest = divmod(size * times, parts)
        if not rest and length not in chosen and (length < size or not on_accelerator):
            yield length, True
