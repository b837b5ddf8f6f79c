"""Sequential refitting: the readers of a rewritten graph, front to back, by regularised least squares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxprune.capture import ModelGraph
from fxprune.compensation.biases import add_to_bias, takes_bias
from fxprune.compensation.calibration import held_out, length
from fxprune.compensation.least_squares import Fit, Rectified, Rows, refitted
from fxprune.compensation.lockstep import Stepper
from fxprune.compensation.targets import Aim, aim_of, scale_and_shift
from fxprune.coupling import Coupling
from fxprune.labels import Labels
from fxprune.readers import Reader, reader_of
from fxprune.rewrite import Checker, narrow

WIDEST = 4096  # features of a layer; wider ones are fitted by channel
ROWS_A_FEATURE = 24
FEWEST_ROWS, MOST_ROWS = 8192, 32768
MOST_NUMBERS = 1 << 26  # rows times features


@dataclass(frozen=True, slots=True)
class Refit:
    """One layer that was refitted: the error of its output before and after, on what was held out, in shares of the
    output's variance; `strength` is that of the ridge, or None where the layer was left as it was.
    """

    layer: str
    before: float
    after: float
    strength: float | None


def refit(
    graph: ModelGraph,
    small: ModelGraph,
    coupling: Coupling,
    keep: NDArray[np.bool_],
    inputs: Sequence[Sequence[Any]],
    *,
    seed: int = 0,
) -> tuple[Refit, ...]:
    """Refit, in place, every layer of `small` that reads something else than it did in `graph`.

    Front to back, so that each is fitted to the inputs that those before it now give.

    Args:
        graph, small: the original and the rewritten graph, both in eval mode.
        inputs: for each batch, the values of the graph's placeholders.
        seed: of the positions that are sampled.
    """
    work = _Work(graph, small, Checker(graph, coupling, keep), inputs, torch.Generator().manual_seed(seed))
    edges = {edge.consumer for edge in coupling.edges}
    changed = set[str]()
    found = []
    with torch.no_grad():
        for node in work.narrow.nodes:
            sources = node.all_input_nodes
            if any(s.name in changed or (node.name in edges and work.is_narrowed(s)) for s in sources):
                changed.add(node.name)
                found += work.refit(node)
            work.narrow.to(node)
            work.advance(node)
    return tuple(found)


class _Work:
    """The two runs, and what has to be known to fit one layer."""

    def __init__(
        self,
        graph: ModelGraph,
        small: ModelGraph,
        checker: Checker,
        inputs: Sequence[Sequence[Any]],
        draw: torch.Generator,
    ) -> None:
        self.small, self.checker, self.draw = small, checker, draw
        self.whole, self.narrow = Stepper(graph, inputs), Stepper(small, inputs)
        self.calls = Counter(str(node.target) for node in self.narrow.nodes if node.op == "call_module")
        names = Counter(id(p) for _, p in small.named_parameters(remove_duplicate=False))
        self.shared = {key for key, count in names.items() if count > 1}
        self.samples = [length(batch) for batch in inputs]

    def is_narrowed(self, node: fx.Node) -> bool:
        """Whether something is missing from the values of a node."""
        value = self.checker.old.get(node.name)
        return isinstance(value, Labels) and not all(bool(mask.all()) for mask in self.checker.masks(value))

    def advance(self, node: fx.Node) -> None:
        """Let go of what lies behind a node in both runs."""
        self.narrow.passed(node)
        if node.name in self.whole.by_name:
            original = self.whole.by_name[node.name]
            self.whole.to(original)
            self.whole.passed(original)

    def refit(self, node: fx.Node) -> list[Refit]:
        """Fit the layer that a node calls, if it calls one whose weights are its own alone."""
        reader = reader_of(self.small, node)
        if reader is None or id(reader.weight) in self.shared or self.calls[str(node.target)] > 1:
            return []
        if node.name not in self.whole.by_name or math.prod(reader.matrix().shape[2:]) > WIDEST:
            return []
        for source in node.all_input_nodes:
            self.narrow.to(source)
        aim = aim_of(self.small, node, self.narrow.values)
        if aim.node.name not in self.whole.by_name:
            aim = Aim(node, aim.norm, behind=False, other=None, rectified=False)
        intercept = takes_bias(reader, aim.norm)
        rows, rectified = self._rows(node, reader, aim, intercept=intercept)
        matrix = reader.matrix()
        weight = matrix.flatten(2).double()
        bias = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        if reader.bias is not None:
            bias = reader.bias.detach().double().reshape(bias.shape)
        fit = refitted(rows, weight, bias, intercept=intercept, rectified=rectified)
        self._write(reader, aim, fit, bias)
        return [Refit(str(node.target) if node.op == "call_module" else node.name, fit.before, fit.after, fit.strength)]

    def _write(self, reader: Reader, aim: Aim, fit: Fit, bias: Tensor) -> None:
        if fit.strength is not None:
            reader.write(fit.weight.reshape(reader.matrix().shape))
            add_to_bias(reader, aim.norm, (fit.bias - bias).reshape(-1))

    def _rows(self, node: fx.Node, reader: Reader, aim: Aim, *, intercept: bool) -> tuple[Rows, Rectified | None]:
        """Sampled inputs of a layer and the outputs wanted there, and what rectifies them."""
        given = self.narrow.to(node.all_input_nodes[0])
        original = self.whole.to(self.whole.by_name[aim.node.name])
        others = None if aim.other is None else self.narrow.values[aim.other]
        masks = self.checker.masks(self.checker.old[aim.node.name])
        matrix = reader.matrix()
        features = matrix.shape[2] * matrix.shape[3]
        count = min(max(ROWS_A_FEATURE * features, FEWEST_ROWS), MOST_ROWS, MOST_NUMBERS // (features * len(matrix)))
        a_sample = max(1, math.ceil(count / sum(self.samples)))
        parts: list[tuple[Tensor, ...]] = []
        seen = 0
        for index, x in enumerate(given):
            wanted = narrow(original[index], masks)
            places = self._places(wanted, reader, a_sample)
            goal = _at(wanted, reader, places)
            other = (
                _at(others[index].expand_as(wanted), reader, places) if others is not None else torch.zeros_like(goal)
            )
            values = _inputs(x, wanted, reader, places)
            held = held_out(self.samples[index], seen)
            seen += self.samples[index]
            parts.append(
                (_precise(values), _precise(goal), _precise(other), held.repeat_interleave(len(goal) // len(held)))
            )
        values, goal, other, held = (torch.cat(column) for column in zip(*parts, strict=True))
        scale, shift = torch.ones_like(goal[:1]), torch.zeros_like(goal[:1])
        if aim.behind and aim.norm is not None:
            scale, shift = (t.to(goal)[None] for t in scale_and_shift(aim.norm))
        safe = torch.where(scale.abs() > 1e-6, scale, torch.full_like(scale, torch.inf))
        goal = (goal - other - shift) / safe
        bare = Rows(values.movedim(1, 0), _grouped(goal, len(matrix)), held.to(goal.device))
        if not intercept and reader.bias is not None:
            bare = Rows(bare.inputs, bare.wanted - reader.bias.detach().reshape(len(matrix), 1, -1), bare.held)
        if not aim.rectified:
            return bare, None
        return bare, Rectified(_grouped(scale, len(matrix)), _grouped(shift + other, len(matrix)))

    def _places(self, wanted: Tensor, reader: Reader, a_sample: int) -> Tensor:
        """Sampled positions, the same in all samples of a batch: flat indices of the grid of positions."""
        positions = _positions(wanted, reader)
        total = math.prod(positions)
        order = torch.randperm(total, generator=self.draw) if a_sample < total else torch.arange(total)
        return order[:a_sample]


def _positions(output: Tensor, reader: Reader) -> tuple[int, ...]:
    """The grid of positions of an output: behind the channels of a convolution, between samples and channels else."""
    if reader.windows is not None:
        return tuple(output.shape[-reader.windows.nd :])
    return tuple(output.shape[1:-1])


def _at(output: Tensor, reader: Reader, places: Tensor) -> Tensor:
    """Output values (samples and places, channels) at some positions."""
    places = places.to(output.device)
    if reader.windows is None:
        return output.reshape(len(output), -1, output.shape[-1])[:, places].flatten(0, 1)
    return output.flatten(-reader.windows.nd)[:, :, places].movedim(1, 2).flatten(0, 1)


def _inputs(x: Tensor, output: Tensor, reader: Reader, places: Tensor) -> Tensor:
    """What the layer reads at some positions: (samples and places, groups, features)."""
    if reader.windows is None:
        return x.reshape(len(x), -1, x.shape[-1])[:, places.to(x.device)].flatten(0, 1)[:, None]
    values = reader.windows.values(x, places, _positions(output, reader))
    return values.unflatten(1, (reader.groups, -1)).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(rows, channels) as (groups, rows, channels a group)."""
    return values.unflatten(1, (groups, -1)).movedim(1, 0)


def _precise(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if x.dtype == torch.float64 else x.float()
