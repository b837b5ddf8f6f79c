"""Random small networks: steps of `steps` strung together, with several inputs and outputs, and layers that share."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from steps import KINDS, SIZE
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo import CLASSES, randomise

from fxprune.rules.table import Key, key_of

FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS.values()))
FORMS = ("tensor", "tuple", "dict")
CHANNELS = 3  # of the inputs
BATCHES = 5, 4  # samples in each batch that a network is scored on
LARGEST = 1e6  # number that a network gives, and of its gradients


@dataclass(frozen=True)
class Step:
    """One step: its kind, the numbers of the values that it reads, the width that was drawn, whose layer it uses.

    The first values are the inputs. ``shares`` is the number of an earlier step of the same kind and widths.
    """

    kind: str
    sources: tuple[int, ...]
    drawn: int
    shares: int | None = None


class RandomNet(nn.Module):
    """Runs a list of steps; the values that no step reads go to two linear heads, one pooled, one flattened.

    ``form`` is that of the output; where it holds more than one tensor, the last value comes out as it is. ``seed`` is
    that of the weights.
    """

    def __init__(self, steps: list[Step], inputs: int = 1, form: str = "tensor", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.inputs, self.form, self.seed = steps, inputs, form, seed
        widths = widths_of(steps, inputs)
        self.layers = nn.ModuleDict()
        for index, step in enumerate(steps):
            layer = KINDS[step.kind].layer
            if layer is not None and step.shares is None:
                self.layers[str(index)] = layer(widths[step.sources[0]], step.drawn)
        read = {source for step in steps for source in step.sources}
        self.ends = [index for index in range(inputs, len(widths)) if index not in read]
        self.pooled = nn.Linear(sum(widths[index] for index in self.ends), CLASSES)
        self.flat = nn.Linear(widths[-1] * 9, CLASSES)

    def forward(self, *inputs: Tensor) -> Any:
        values, layers = list(inputs), dict(self.layers.items())
        for index, step in enumerate(self.steps):
            layer = layers.get(str(index if step.shares is None else step.shares))
            values.append(KINDS[step.kind].run(layer, *(values[source] for source in step.sources)))
        pooled = torch.cat([values[index].mean((2, 3)) for index in self.ends], 1)
        result = self.pooled(pooled) + self.flat(F.max_pool2d(values[-1], 2).flatten(1))
        if self.form == "tensor":
            return result
        return (result, values[-1]) if self.form == "tuple" else {"result": result, "map": values[-1]}

    @property
    def alike(self) -> bool:
        """Whether no step minds the order of channels."""
        return all(KINDS[step.kind].alike for step in self.steps)

    def example(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Images of the dtype of the weights, one for each input; the same ones whatever the dtype."""
        draw = torch.Generator().manual_seed(batch)
        shape = batch, CHANNELS, SIZE, SIZE
        drawn = (torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(self.inputs))
        return tuple(image.to(self.flat.weight.dtype) for image in drawn)

    def __repr__(self) -> str:
        return f"RandomNet({self.steps}, inputs={self.inputs}, form={self.form!r}, seed={self.seed})"


def widths_of(steps: list[Step], inputs: int = 1) -> list[int]:
    """The number of channels of the inputs and of every step's value."""
    widths = [CHANNELS] * inputs
    for step in steps:
        widths.append(KINDS[step.kind].width(widths[step.sources[0]], step.drawn))
    return widths


def keys_of(graph: fx.GraphModule) -> set[Key]:
    """The operations of a graph, as they stand in the table of rules."""
    return {key_of(node, graph) for node in graph.graph.nodes if node.op.startswith("call")}


def one_of_each(names: list[str]) -> RandomNet:
    """A network with a branch for every kind of ``names``: the step, behind convolutions of its own.

    Element-wise steps of one image share their convolution: there is nothing that they could tie for each other.
    """
    steps, shared = [Step("conv", (0,), 6)], (1,)
    for name in names:
        kind, sources = KINDS[name], shared
        if (kind.family, kind.inputs, kind.alike, kind.whole) != ("pointwise", 1, True, False):
            width = next(width for width in (6, 8, 4) if kind.needs(width))
            sources = tuple(range(len(steps) + 1, len(steps) + 1 + kind.inputs))
            steps += [Step("conv", (0,), width)] * kind.inputs
        steps.append(Step(name, sources, 8))
    return randomise(RandomNet(steps)).double().eval()


@st.composite
def nets(draw: st.DrawFn, length: int = 10, *, alike: bool = False) -> RandomNet:
    """Networks of a convolution and up to ``length`` further steps, with random weights in float64.

    ``alike`` takes steps alone that treat all channels alike.
    """
    inputs, form = draw(st.integers(1, 3)), draw(st.sampled_from(FORMS))
    steps = [Step("conv", (0,), draw(st.sampled_from([8, 12])))]
    for _ in range(draw(st.integers(1, length))):
        steps.append(draw(_step(steps, inputs, alike=alike)))
    net = randomise(RandomNet(steps, inputs, form, draw(st.integers(0, 1000)))).double().eval()
    assume(all(_is_tame(other) for other in (copy.deepcopy(net).float(), net)))
    return net


def _is_tame(net: RandomNet) -> bool:
    """Whether what a network gives and its gradients are far from overflow, on the batches that it is scored on."""
    found = [t for batch in BATCHES for t in pytree.tree_leaves(net(*net.example(batch)))]
    loss = sum(t.to(net.flat.weight).square().mean() for t in found)
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return all(bool((t.abs() < LARGEST).all()) for t in (*found, *gradients) if t is not None)


@st.composite
def _step(draw: st.DrawFn, steps: list[Step], inputs: int, *, alike: bool) -> Step:
    """One more step: a family first, since some have many kinds, then a kind that fits."""
    widths = widths_of(steps, inputs)
    source = draw(st.integers(max(0, len(widths) - 4), len(widths) - 1))
    partners = [i for i in range(inputs, len(widths)) if widths[i] == widths[source]]
    family = draw(st.sampled_from(FAMILIES))
    kinds = [name for name, kind in KINDS.items() if kind.family == family and kind.needs(widths[source])]
    kinds = [k for k in kinds if (partners or KINDS[k].inputs == 1) and (KINDS[k].alike or not alike)]
    if not kinds:
        return Step("conv", (source,), draw(st.sampled_from([4, 8, 12])))
    name = draw(st.sampled_from(kinds))
    others = [draw(st.sampled_from(partners)) for _ in range(KINDS[name].inputs - 1)]
    earlier = [
        index
        for index, step in enumerate(steps)
        if step.kind == name and step.shares is None and widths[step.sources[0]] == widths[source]
    ]
    if earlier and draw(st.booleans()):
        return Step(name, (source, *others), steps[earlier[0]].drawn, earlier[0])
    return Step(name, (source, *others), draw(st.sampled_from([4, 8, 12])))
