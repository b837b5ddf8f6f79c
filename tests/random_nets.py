"""Random small networks: a table of steps, and a hypothesis strategy that strings them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import CLASSES, randomise

SIZE = 6  # of the images; every step keeps it


@dataclass(frozen=True)
class Kind:
    """What a step is: the layer that it makes of its input width, the width that it gives, and how it runs.

    ``width`` and ``layer`` take the input width and the drawn width; ``run`` takes the layer and the inputs.
    """

    run: Callable[..., Tensor]
    layer: Callable[[int, int], nn.Module] | None = None
    width: Callable[[int, int], int] = lambda inputs, drawn: inputs
    needs: Callable[[int], bool] = lambda inputs: True
    binary: bool = False


def _drawn(inputs: int, drawn: int) -> int:
    return drawn


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _gate(inputs: int, drawn: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, drawn, 1), nn.ReLU(), nn.Conv2d(drawn, inputs, 1), nn.Sigmoid())


def _even(inputs: int) -> bool:
    return inputs % 2 == 0


def _shuffled(x: Tensor, groups: int = 2) -> Tensor:
    return x.view(x.size(0), groups, -1, SIZE, SIZE).transpose(1, 2).reshape(x.shape)


def _apply(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


KINDS: dict[str, Kind] = {
    "conv": Kind(_apply, _conv, _drawn),
    "conv without bias": Kind(_apply, lambda i, o: _conv(i, o, bias=False), _drawn),
    "transposed": Kind(_apply, lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1), _drawn),
    "grouped": Kind(_apply, lambda i, o: _conv(i, o, groups=2), _drawn, _even),
    "four groups": Kind(_apply, lambda i, o: _conv(i, o, groups=4), _drawn, lambda i: i % 4 == 0),
    "depthwise": Kind(_apply, lambda i, o: _conv(i, i, groups=i)),
    "multiplied": Kind(_apply, lambda i, o: _conv(i, 2 * i, groups=i), lambda i, o: 2 * i, lambda i: i <= 12),
    "linear": Kind(lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Linear, _drawn),
    "norm": Kind(_apply, lambda i, o: nn.BatchNorm2d(i)),
    "prelu": Kind(_apply, lambda i, o: nn.PReLU(i)),
    "gate": Kind(lambda layer, x: x * layer(F.adaptive_avg_pool2d(x, 1)), _gate),
    "relu": Kind(lambda _, x: F.relu(x)),
    "gelu": Kind(lambda _, x: F.gelu(x)),
    "sigmoid": Kind(lambda _, x: x.sigmoid()),
    "roll": Kind(lambda _, x: torch.roll(x, 2, 1)),
    "flip": Kind(lambda _, x: x.flip(1)),
    "pad": Kind(lambda _, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=0.5), 3, 1)),
    "pool": Kind(lambda _, x: F.max_pool2d(x, 3, 1, 1)),
    "upsample": Kind(lambda _, x: F.avg_pool2d(F.interpolate(x, scale_factor=2), 2)),
    "shuffle": Kind(lambda _, x: _shuffled(x), needs=_even),
    "second half": Kind(lambda _, x: x[:, x.shape[1] // 2 :], width=lambda i, o: i - i // 2, needs=lambda i: i > 4),
    "every second": Kind(lambda _, x: x[:, ::2], width=lambda i, o: i - i // 2, needs=lambda i: i > 4),
    "zero channels": Kind(lambda _, x: F.pad(x, (0, 0, 0, 0, 1, 2)), width=lambda i, o: i + 3),
    "halves": Kind(lambda _, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], width=lambda i, o: i // 2, needs=_even),
    "maxout": Kind(lambda _, x: x.view(x.size(0), -1, 2, SIZE, SIZE).amax(2), width=lambda i, o: i // 2, needs=_even),
    "rejoin": Kind(lambda _, x: torch.cat(x.split([3, x.shape[1] - 3], 1)[::-1], 1), needs=lambda i: i > 3),
    "add": Kind(lambda _, x, y: x + y, binary=True),
    "sub": Kind(lambda _, x, y: x - y, binary=True),
    "mul": Kind(lambda _, x, y: x * y.tanh(), binary=True),
    "maximum": Kind(lambda _, x, y: torch.maximum(x, y), binary=True),
    "cat": Kind(lambda _, x, y: torch.cat([x, y], 1), width=lambda i, o: 2 * i, needs=lambda i: i <= 12, binary=True),
}


@dataclass(frozen=True)
class Step:
    """One step: its kind, the numbers of the values that it reads (0 is the image), the width that was drawn."""

    kind: str
    sources: tuple[int, ...]
    drawn: int


class RandomNet(nn.Module):
    """Runs a list of steps; the values that no step reads go to two linear heads, one pooled, one flattened."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps, widths = steps, widths_of(steps)
        self.layers = nn.ModuleDict()
        for index, step in enumerate(steps):
            layer = KINDS[step.kind].layer
            if layer is not None:
                self.layers[str(index)] = layer(widths[step.sources[0]], step.drawn)
        read = {source for step in steps for source in step.sources}
        self.ends = [index for index in range(1, len(widths)) if index not in read]
        self.pooled = nn.Linear(sum(widths[index] for index in self.ends), CLASSES)
        self.flat = nn.Linear(widths[-1] * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        values, layers = [x], dict(self.layers.items())
        for index, step in enumerate(self.steps):
            layer = layers.get(str(index))
            values.append(KINDS[step.kind].run(layer, *(values[source] for source in step.sources)))
        pooled = torch.cat([values[index].mean((2, 3)) for index in self.ends], 1)
        return self.pooled(pooled) + self.flat(F.max_pool2d(values[-1], 2).flatten(1))


def widths_of(steps: list[Step]) -> list[int]:
    """The number of channels of the image and of every step's value."""
    widths = [3]
    for step in steps:
        widths.append(KINDS[step.kind].width(widths[step.sources[0]], step.drawn))
    return widths


@st.composite
def nets(draw: st.DrawFn, length: int = 10) -> RandomNet:
    """Networks of a convolution and up to ``length`` further steps, with random weights in float64."""
    steps = [Step("conv", (0,), draw(st.sampled_from([8, 12])))]
    for _ in range(draw(st.integers(1, length))):
        widths = widths_of(steps)
        source = draw(st.integers(max(0, len(widths) - 4), len(widths) - 1))
        partners = [i for i in range(1, len(widths)) if widths[i] == widths[source]]
        kinds = [k for k, kind in KINDS.items() if kind.needs(widths[source]) and (partners or not kind.binary)]
        kind = draw(st.sampled_from(kinds))
        second = (draw(st.sampled_from(partners)),) if KINDS[kind].binary else ()
        steps.append(Step(kind, (source, *second), draw(st.sampled_from([4, 8, 12]))))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return randomise(RandomNet(steps)).double().eval()
