"""Parameters and multiply-accumulates of every plan, from one look at the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.caller.arrays import Flags, Index, Scalars
from fxprune.caller.batches import sample_count
from fxprune.caller.tensors import all_tensors, first_names
from fxprune.coupling.groups import Coupling
from fxprune.planning.widths import Axes, Product, Products, Ruler, Widths, products
from fxprune.rules.context import labels_in
from fxprune.rules.contractions import terms_of
from fxprune.rules.labels import Labels
from fxprune.rules.table import key_of
from fxprune.tracing.attention import ScaledDotProduct
from fxprune.tracing.graph import ModelGraph, example_of, flops_of

Formula = Callable[..., Sequence[Product]]
FORMULAS: dict[Any, Formula] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What the model costs under any plan: sums of products of widths.

    `flops` are those of all `samples` of the example. `inexact` names nodes whose work could not be written as such a
    product, and counts as if it never changed.
    """

    widths: Widths
    params: Products
    flops: Products
    samples: int
    inexact: tuple[str, ...] = ()

    def parameters(self, keep: Flags) -> int:
        """The number of parameters where the units `keep` stay."""
        return int(self.params.of(self.widths.under(keep)).sum())

    def macs(self, keep: Flags) -> int:
        """Multiply-accumulates of one sample where the units `keep` stay."""
        return int(self.flops.of(self.widths.under(keep)).sum() // 2 // self.samples)

    def unit_params(self, units: int) -> Scalars:
        """The parameters that go with each unit alone."""
        return self.params.slopes(self.widths, np.ones(units, dtype=bool))

    def unit_macs(self, units: int) -> Scalars:
        """The multiply-accumulates of one sample that go with each unit alone."""
        return self.flops.slopes(self.widths, np.ones(units, dtype=bool)) / 2 / self.samples

    def arrays(self) -> dict[str, Index]:
        """The numbers, as arrays of their names."""
        return self.widths.arrays() | self.params.arrays("params") | self.flops.arrays("flops")

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Index], samples: int, inexact: tuple[str, ...]) -> Costs:
        """The costs that `arrays` were taken from."""
        widths = Widths.of_arrays(arrays)
        params, work = (Products.of_arrays(arrays, name) for name in ("params", "flops"))
        return cls(widths, params, work, samples, inexact)


def costs_of(graph: ModelGraph, coupling: Coupling) -> Costs:
    """The parameters of `graph` and the work of each of its nodes, written as products of widths."""
    ruler, counted = Ruler(coupling), flops_of(graph)
    params = [ruler.product(ruler.parameter(name, p.shape)) for name, p in graph.named_parameters()]
    accounts = Accounts(graph, ruler)
    work = [row for node in graph.graph.nodes if counted[node.name] for row in accounts.rows(node, counted[node.name])]
    inexact = tuple(accounts.inexact)
    return Costs(ruler.widths(), products(params), products(work), sample_count(example_of(graph)), inexact)


@dataclass(slots=True)
class Accounts:
    """Writes the flops of nodes as products of widths."""

    graph: ModelGraph
    ruler: Ruler
    inexact: list[str] = field(default_factory=list)
    owners: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.owners = first_names(all_tensors(self.graph))

    def rows(self, node: fx.Node, counted: int) -> list[Product]:
        """The products whose sum is `counted` on the original; one that never changes where there is no formula."""
        found = self._products(node)
        whole = sum(row.factor * self.ruler.size(row.axes) for row in found)
        if not whole or counted % whole:
            if self._may_change(node):
                self.inexact.append(node.name)
            return [Product(counted)]
        return [replace(row, factor=counted // whole * row.factor) for row in found]

    def _products(self, node: fx.Node) -> Sequence[Product]:
        values = self.ruler.coupling.values
        formula = FORMULAS.get(key_of(node, self.graph))
        if formula is None:
            return []
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source.name])
        own = self._own(node) if node.op == "call_module" else {}
        return formula(Work(self.ruler, own, values[node.name]), *args, **kwargs)

    def _own(self, node: fx.Node) -> dict[str, Axes]:
        """The axes of the parameters and buffers of the module that a node calls."""
        module = self.graph.get_submodule(str(node.target))
        owned = all_tensors(module).items()
        return {name: self.ruler.parameter(self.owners[f"{node.target}.{name}"], t.shape) for name, t in owned}

    def _may_change(self, node: fx.Node) -> bool:
        values = [self.ruler.coupling.values[n.name] for n in (node, *node.all_input_nodes)]
        axes = [self.ruler.tensor(x) for x in labels_in(values)]
        own = self._own(node).values() if node.op == "call_module" else ()
        return any(self.ruler.changes(axis) for each in (*axes, *own) for axis in each)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a formula may look at: the widths, the parameters of the node's module, and the node's value."""

    ruler: Ruler
    own: Mapping[str, Axes]
    value: Any

    def axes(self, x: Any) -> Axes:
        """The axes of a tensor."""
        return self.ruler.tensor(x)

    def product(self, *axes: int, vanishing: Axes = ()) -> Product:
        """The product of the widths of some axes."""
        return self.ruler.product(axes, vanishing=vanishing)


def _formula(*keys: Any) -> Callable[[Formula], Formula]:
    """Register the decorated function: products of widths that the flops of a node are proportional to, in all."""

    def register(function: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(keys, function))
        return function

    return register


@_formula(nn.Linear)
def _linear_module(work: Work, x: Labels) -> list[Product]:
    return [work.product(*work.axes(x), work.own["weight"][0])] if "weight" in work.own else []


@_formula(F.linear)
def _linear(work: Work, x: Labels, weight: Labels, bias: Any = None) -> list[Product]:
    return [work.product(*work.axes(x), work.axes(weight)[0])]


@_formula(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
@_formula(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def _own_matrices(work: Work, *args: Any, **kwargs: Any) -> list[Product]:
    """Every position, or every step, meets each entry of the module's weights once."""
    return [work.product(*axes) for axes in work.own.values() if len(axes) > 1]


@_formula(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _convolution(work: Work, x: Labels, weight: Labels, *args: Any, **kwargs: Any) -> list[Product]:
    return [work.product(*work.axes(weight))]


@_formula(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__")
def _matmul(work: Work, a: Labels, b: Labels) -> list[Product]:
    return [work.product(*work.axes(work.value), work.axes(a)[-1])]


@_formula(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def _addmm(work: Work, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> list[Product]:
    return [work.product(*work.axes(work.value), work.axes(a)[-1])]


@_formula(torch.addbmm, "addbmm")
def _addbmm(work: Work, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> list[Product]:
    return [work.product(*work.axes(a), work.axes(b)[-1])]


@_formula(torch.einsum)
def _einsum(work: Work, equation: str, *operands: Any) -> list[Product]:
    """Of two operands: all letters but those that one of them has for itself, which are summed beforehand.

    Where every letter that is summed has one index left, torch multiplies element by element, which does not count.
    """
    inputs = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    terms, output = terms_of(equation, inputs)
    if len(inputs) != 2 or any(len(set(term)) < len(term) for term in terms):
        return []
    letters = set(output) | (set(terms[0]) & set(terms[1]))
    found: dict[str, int] = {}
    for term, x in zip(terms, inputs, strict=True):
        for letter, axis in zip(term, work.axes(x), strict=True):
            if letter in letters and work.ruler.size((axis,)) >= work.ruler.size((found.get(letter, axis),)):
                found[letter] = axis
    summed = tuple(found[letter] for letter in sorted(letters - set(output)))
    return [work.product(*(found[letter] for letter in sorted(letters)), vanishing=summed)]


@_formula(ScaledDotProduct, F.scaled_dot_product_attention)
def _attention(work: Work, query: Labels, key: Labels, value: Labels, *args: Any, **kwargs: Any) -> list[Product]:
    """Queries by keys, and their weights by values."""
    q, k, v = (work.axes(x) for x in (query, key, value))
    return [work.product(*q, k[-2]), work.product(*q[:-1], k[-2], v[-1])]
