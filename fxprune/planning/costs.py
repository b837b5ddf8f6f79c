"""Parameters and multiply-accumulates of a model under any plan, as sums of products of widths."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
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
from fxprune.rules.experts import expert_linear
from fxprune.rules.labels import Labels
from fxprune.rules.table import Key, key_of, registers
from fxprune.tracing.attention import ScaledDotProduct
from fxprune.tracing.graph import ModelGraph, example_of, flops_of

Formula = Callable[..., list[Product]]
FORMULAS: dict[Key, Formula] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What a model costs under any plan: sums of products of widths.

    `flops` are those of all `samples` of the example. `inexact` names nodes whose flops cannot be written as such
    products; they count as constant.
    """

    widths: Widths
    params: Products
    flops: Products
    samples: int
    inexact: tuple[str, ...] = ()

    def parameters(self, keep: Flags) -> int:
        """The number of parameters where the units `keep` are kept."""
        return int(self.params.of(self.widths.under(keep)).sum())

    def macs(self, keep: Flags) -> int:
        """Multiply-accumulates of one sample where the units `keep` are kept."""
        return int(self.flops.of(self.widths.under(keep)).sum() // 2 // self.samples)

    def unit_params(self, units: int) -> Scalars:
        """The parameters that the removal of each unit alone saves."""
        return self.params.slopes(self.widths, np.ones(units, dtype=bool))

    def unit_macs(self, units: int) -> Scalars:
        """The multiply-accumulates of one sample that the removal of each unit alone saves."""
        return self.flops.slopes(self.widths, np.ones(units, dtype=bool)) / 2 / self.samples

    def arrays(self) -> dict[str, Index]:
        """The numbers, as arrays by their names."""
        return self.widths.arrays() | self.params.arrays("params_") | self.flops.arrays("flops_")

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Index], samples: int, inexact: tuple[str, ...]) -> Costs:
        """The costs that `arrays` were taken from."""
        params, flops = (Products.of_arrays(arrays, name) for name in ("params_", "flops_"))
        return cls(Widths.of_arrays(arrays), params, flops, samples, inexact)


def costs_of(graph: ModelGraph, coupling: Coupling) -> Costs:
    """The parameters of `graph` and the flops of each of its nodes, written as products of widths."""
    ruler, counted = Ruler(coupling), flops_of(graph)
    experts, owners = _experts_of(graph, coupling), first_names(all_tensors(graph))
    params = [
        ruler.product((*ruler.parameter(name, p.shape), *map(ruler.expert, experts.get(owners[name], ()))))
        for name, p in graph.named_parameters()
    ]
    accounts = Accounts(graph, ruler)
    flops = [
        replace(row, axes=(*row.axes, *map(ruler.expert, experts.get(node.name, ()))))
        for node in graph.graph.nodes
        if counted[node.name]
        for row in accounts.rows(node, counted[node.name])
    ]
    samples = sample_count(example_of(graph))
    return Costs(ruler.widths(), products(params), products(flops), samples, tuple(accounts.inexact))


def _experts_of(graph: ModelGraph, coupling: Coupling) -> dict[str, tuple[int]]:
    """Name of a node or parameter -> the expert that it serves, if it serves a single one."""
    found: dict[str, tuple[int]] = {}
    held: dict[str, set[int]] = {}
    expert_of = {name: branch.expert for branch in coupling.branches for name in branch.nodes if branch.expert >= 0}
    for node in graph.graph.nodes:
        if node.name in expert_of:
            found[node.name] = (expert_of[node.name],)
        if node.op in ("call_module", "get_attr"):
            held.setdefault(str(node.target), set()).add(expert_of.get(node.name, -1))
    for path, experts in held.items():
        if len(experts) == 1 and min(experts) >= 0:
            owned = all_tensors(graph.get_submodule(path)) if path in dict(graph.named_modules()) else {"": None}
            found |= {f"{path}.{name}".rstrip("."): (min(experts),) for name in owned}
    return found


@dataclass(slots=True)
class Accounts:
    """Writes the flops of nodes as products of widths; `inexact` names the nodes where that failed."""

    graph: ModelGraph
    ruler: Ruler
    inexact: list[str] = field(default_factory=list)
    owners: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.owners = first_names(all_tensors(self.graph))

    def rows(self, node: fx.Node, counted: int) -> list[Product]:
        """The products whose sum is `counted` on the original; a constant where there is no formula."""
        values, parameters = self.ruler.coupling.values, self._parameters(node)
        formula, found = FORMULAS.get(key_of(node, self.graph)), list[Product]()
        if formula is not None:
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source.name])
            found = formula(CountedCall(self.ruler, parameters, values[node.name]), *args, **kwargs)
        whole = sum(row.factor * self.ruler.size(row.axes) for row in found)
        if whole and counted % whole == 0:
            return [replace(row, factor=counted // whole * row.factor) for row in found]
        tensors = labels_in([values[n.name] for n in (node, *node.all_input_nodes)])
        axes = (*map(self.ruler.tensor, tensors), *parameters.values())
        if any(self.ruler.changes(axis) for each in axes for axis in each):
            self.inexact.append(node.name)
        return [Product(counted)]

    def _parameters(self, node: fx.Node) -> dict[str, Axes]:
        """The axes of the parameters and buffers of the module that a node calls, if it does."""
        if node.op != "call_module":
            return {}
        module = self.graph.get_submodule(str(node.target))
        owned = all_tensors(module).items()
        return {name: self.ruler.parameter(self.owners[f"{node.target}.{name}"], t.shape) for name, t in owned}


@dataclass(frozen=True, slots=True, eq=False)
class CountedCall:
    """The input of a formula: the widths, the axes of the called module's parameters, and the call's value."""

    ruler: Ruler
    parameters: Mapping[str, Axes]
    value: Any

    def axes(self, x: Any) -> Axes:
        """The axes of a tensor."""
        return self.ruler.tensor(x)

    def product(self, *axes: int, vanishing: Axes = ()) -> Product:
        """The product of the widths of some axes."""
        return self.ruler.product(axes, vanishing=vanishing)


_formula = registers(FORMULAS)  # products whose sum is proportional to the flops of nodes of these operations


@_formula(nn.Linear)
def _linear_module(call: CountedCall, x: Labels) -> list[Product]:
    return [call.product(*call.axes(x), call.parameters["weight"][0])] if "weight" in call.parameters else []


@_formula(F.linear)
def _linear(call: CountedCall, x: Labels, weight: Labels, bias: Any = None) -> list[Product]:
    return [call.product(*call.axes(x), call.axes(weight)[0])]


@_formula(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
@_formula(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def _own_matrices(call: CountedCall, *args: Any, **kwargs: Any) -> list[Product]:
    """Every position, or every step, uses each entry of the module's weights once."""
    return [call.product(*axes) for axes in call.parameters.values() if len(axes) > 1]


@_formula(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _convolution(call: CountedCall, x: Labels, weight: Labels, *args: Any, **kwargs: Any) -> list[Product]:
    return [call.product(*call.axes(weight))]


@_formula(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__")
@_formula(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def _matmul(call: CountedCall, *operands: Labels, **kwargs: Any) -> list[Product]:
    return [call.product(*call.axes(call.value), call.axes(operands[-2])[-1])]


@_formula(torch.addbmm, "addbmm")
def _addbmm(call: CountedCall, bias: Labels, a: Labels, b: Labels, **kwargs: Any) -> list[Product]:
    return [call.product(*call.axes(a), call.axes(b)[-1])]


@_formula(expert_linear)
def _expert_linear(
    call: CountedCall, x: Labels, experts: Labels, weight: Labels, *args: Any, **kw: Any
) -> list[Product]:
    return [call.product(*call.axes(x), call.axes(call.value)[1])]


@_formula(torch.einsum)
def _einsum(call: CountedCall, equation: str, *operands: Any) -> list[Product]:
    """Of two operands: the letters of the output and of both; others are summed beforehand.

    Where all summed letters have size 1, torch multiplies element by element, which does not count.
    """
    inputs = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    terms, output = terms_of(equation, inputs)
    if len(inputs) != 2 or any(len(set(term)) < len(term) for term in terms):
        return []
    letters = set(output) | (set(terms[0]) & set(terms[1]))
    found: dict[str, int] = {}
    for term, x in zip(terms, inputs, strict=True):
        for letter, axis in zip(term, call.axes(x), strict=True):
            if letter in letters and call.ruler.size((axis,)) >= call.ruler.size((found.get(letter, axis),)):
                found[letter] = axis
    summed = tuple(found[letter] for letter in sorted(letters - set(output)))
    return [call.product(*(found[letter] for letter in sorted(letters)), vanishing=summed)]


@_formula(ScaledDotProduct, F.scaled_dot_product_attention)
def _attention(
    call: CountedCall, query: Labels, key: Labels, value: Labels, *args: Any, **kwargs: Any
) -> list[Product]:
    """Queries by keys, and their weights by values."""
    q, k, v = (call.axes(x) for x in (query, key, value))
    return [call.product(*q, k[-2]), call.product(*q[:-1], k[-2], v[-1])]
