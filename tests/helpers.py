"""Small things that several test files need: running a model, looking at its widths, taking its picture."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.coupling.couple import analyse
from fxprune.coupling.gates import Gate, insert
from fxprune.coupling.groups import Edge
from fxprune.tracing.capture import capture


def call(model: nn.Module, inputs: Any) -> Any:
    """Run ``model`` on a copy of a tensor, a tuple of positional or a dict of named arguments."""
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a nested output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def part_of(cases: Iterable[Any], every: int, ids: Iterable[str] | None = None) -> list[Any]:
    """Parameters of a test: one case in so many runs always, the rest are marked `wide`."""
    params = []
    for number, (case, name) in enumerate(zip(cases, ids or itertools.repeat(None), strict=False)):
        marks = () if number % every == 0 else pytest.mark.wide
        params.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name, marks=marks))
    return params


def graph_of(model: nn.Module, example: Any, **options: Any) -> Any:
    """The graph of a model, compared with it on the example alone: the whole proof takes longer than the rest."""
    graph = capture(model, example, prove=False, **options)
    assert difference(outputs(model, example), outputs(graph, example)) <= max(rounding(model), 1e-12)
    return graph


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What ``model`` gives in eval mode, without gradients, with the same random numbers each time; its mode stays."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        result = [tensor.clone() for tensor in tensors_of(call(model, inputs))]
    for module, mode in modes:
        module.training = mode
    return result


def double(inputs: Any) -> Any:
    """Every floating tensor of ``inputs`` in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference between two lists of outputs, relative to the scale of the first."""
    assert [t.shape for t in a] == [t.shape for t in b]
    scale = max((float(t.abs().max()) for t in a if t.numel()), default=0.0) or 1.0
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0) / scale


def rounding(model: nn.Module) -> float:
    """How far a graph of ``model`` may be from it: nn.MultiheadAttention has kernels that round in another way."""
    return 1e-6 if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()) else 0.0


def same_kind(found: nn.Module | None, module: nn.Module) -> bool:
    """Whether ``found`` is of the type of ``module``; attention that can be looked into is a kind of attention."""
    exact = not isinstance(module, nn.MultiheadAttention)
    return type(found) is type(module) if exact else isinstance(found, type(module))


def parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def width(model: nn.Module, name: str) -> int:
    """The size on the output side of the module called ``name``, or all the elements of that parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    found = (
        getattr(model.get_submodule(owner), leaf)
        if name not in dict(model.named_modules())
        else model.get_submodule(name)
    )
    if isinstance(found, Tensor):
        return found.numel()
    attributes = ("out_channels", "out_features", "num_features", "num_parameters", "embedding_dim", "hidden_size")
    for attribute in attributes:
        if hasattr(found, attribute):
            return int(getattr(found, attribute))
    raise AssertionError(f"{name} is a {type(found).__name__}, which has no width")


def stored_width(model: nn.Module, site: str) -> int:
    """The width of a site by the tensors that are really there."""
    if site in dict(model.named_parameters()):
        return max(dict(model.named_parameters())[site].shape)
    module = model.get_submodule(site)
    assert isinstance(module.weight, Tensor)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return module.weight.shape[1]
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return module.weight.shape[1] * module.groups
    return module.weight.shape[0]


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model (and of the world) that the package must leave as it is."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "values": {name: (t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "flags": {name: (p.requires_grad, p.grad, p.is_leaf) for name, p in model.named_parameters()},
        "modes": {name: (type(m), m.training, m.forward) for name, m in model.named_modules(remove_duplicate=False)},
        "hooks": {name: [len(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        "members": {
            name: {k: id(v) for k, v in vars(m).items() if k != "training"} for name, m in model.named_modules()
        },
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
        "world": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
    }


def same_picture(a: Any, b: Any) -> bool:
    """Whether two pictures are equal, tensor by tensor."""
    if isinstance(a, (Tensor, np.ndarray)):
        return isinstance(b, type(a)) and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_picture(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_picture(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same tensors under the same names, bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def storages(model: nn.Module) -> set[int]:
    """The addresses of all storages that a model holds."""
    held = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in held if tensor.numel()}


def squares(output: Any, target: Any = None) -> Tensor:
    """A loss for any output: the mean square of its floating tensors."""
    del target
    parts = [tensor.square().mean() for tensor in tensors_of(output) if tensor.is_floating_point()]
    return torch.stack(parts).sum()


def batches(example: Any, classes: int, sizes: tuple[int, ...] = (4, 3, 1)) -> list[tuple[Any, Tensor]]:
    """A loader: batches of ``sizes`` made by ``example(batch=...)``, with labels that run through the classes."""
    made = []
    for index, size in enumerate(sizes):
        made.append((example(size), (torch.arange(size) + index) % classes))
    return made


class Factor(Gate):
    """Multiplies what is read of one unit by a factor."""

    def __init__(self, edge: Edge) -> None:
        super().__init__(edge)
        self.unit, self.factor = -1, 1.0

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        shape = [1] * x.ndim
        shape[self.dim] = len(self.units)
        return x * self.factors().view(shape)

    def weigh(self, weight: Tensor) -> Tensor:
        return weight * self.factors()

    def factors(self) -> Tensor:
        factors = torch.ones(len(self.units), dtype=torch.float64)
        factors[torch.from_numpy(self.units == self.unit)] = self.factor
        return factors


def sizes_of_slopes(model: nn.Module, example: Any, loss: Callable[[Tensor], Tensor]) -> Callable[[int], float]:
    """Unit -> the sum over the edges that read it of |d loss / d factor there|, by central differences."""
    graph = capture(model, example)
    gated, gates = insert(graph, analyse(graph), Factor)
    gated.eval()

    def at(gate: Factor, unit: int, factor: float) -> float:
        gate.unit, gate.factor = unit, factor
        value = float(loss(outputs(gated, example)[0]))
        gate.factor = 1.0
        return value

    def size(unit: int, step: float = 1e-5) -> float:
        own = [gate for gate in gates if isinstance(gate, Factor) and (gate.units == unit).any()]
        return sum(abs(at(gate, unit, 1 + step) - at(gate, unit, 1 - step)) / (2 * step) for gate in own)

    return size
