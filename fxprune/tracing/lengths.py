"""The lengths of a model's inputs at which its graph is fixed: at others, the graph gives other outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxprune.caller.example import leaves_of, numbers_in
from fxprune.caller.other_batches import Place, lengths_of, resized
from fxprune.tracing.agreement import difference
from fxprune.tracing.graph import ModelGraph, captured_of
from fxprune.tracing.trials import Trial, run_graph, tried_afresh

_CHEAP, _TIMES = 1 << 16, 4  # numbers in a batch that is tried in any case; and how many times those of the example


def fixed_lengths(
    own: nn.Module, graph: ModelGraph, example: Any, concrete: Mapping[str, Any]
) -> Iterator[tuple[Place, str]]:
    """The places in an example whose lengths are fixed in a graph without an error; each with the difference.

    A place is named where `own`, a copy of the model, runs at another length, and the graph gives another output.
    Places of one length are changed together, or else one by one.
    """
    for size, places in lengths_of(example).items():
        for together in (places, *([place] for place in places if len(places) > 1)):
            ran = False
            for trial, length in _trials(own, graph, example, together, size, concrete):
                ran = True
                try:
                    found = run_graph(graph, trial)
                except Exception:  # noqa: BLE001, S112 - whatever the graph raises at a length that it does not take
                    continue
                if differs := difference(trial.output, found):
                    yield together[0], f"with {length}, it gives other outputs than the model ({differs})"
                    break
            if ran and together is places:
                break


def _trials(
    own: nn.Module, graph: ModelGraph, example: Any, places: Sequence[Place], size: int, concrete: Mapping[str, Any]
) -> Iterator[tuple[Trial, int]]:
    """The model's outputs at other lengths: one more, half, and those beside which its forward decides."""
    beside = {length + step for at, length in captured_of(graph).by_length if at == size for step in (-1, 0, 1)}
    tensors = [leaf for leaf in leaves_of(example) if isinstance(leaf, Tensor)]
    largest = max(_CHEAP, _TIMES * numbers_in(example))
    on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors)
    if on_accelerator and not all(tensor.is_floating_point() for tensor in tensors):
        return  # an index out of range would end the process
    for length in sorted({size + 1, size // 2, *beside} - {size}, key=lambda length: abs(length - size)):
        if length < 1 or (on_accelerator and length > size):
            continue
        batch = resized(example, places, length)
        if numbers_in(batch) <= largest:
            for trial in tried_afresh(own, batch, concrete, grads=(False,)):
                yield trial, length
