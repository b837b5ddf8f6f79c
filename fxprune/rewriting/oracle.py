"""The oracle: the original with removed units zeroed wherever they are read; a rewritten model must equal it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.caller.arrays import Flags
from fxprune.caller.isolation import device_of
from fxprune.coupling.gates import Gate, insert
from fxprune.coupling.groups import Coupling, Edge
from fxprune.rewriting.mending import preserve
from fxprune.rewriting.node_mending import Mending
from fxprune.rewriting.remaining import Checker, narrowed_copy
from fxprune.rules.labels import Labels
from fxprune.rules.resize import resize
from fxprune.tracing.graph import ModelGraph


def oracle(graph: ModelGraph, coupling: Coupling, keep: Flags) -> fx.GraphModule:
    """A graph with a mask on every edge that reads a unit without `keep`, residual branches among them.

    Statistics over removed units are recomputed over the kept ones.
    """
    gated, _ = insert(graph, coupling, lambda edge: Mask(edge, keep), branches=True)
    nodes = {node.name: node for node in gated.graph.nodes}
    for name in reversed(coupling.statistics):  # the last first, so that each finds the inputs that it had
        _on_kept(gated, nodes[name], Checker(graph, coupling, keep))
    gated.graph.lint()
    gated.recompile()
    return gated


def _on_kept(gated: fx.GraphModule, node: fx.Node, checker: Checker) -> None:
    """Let a node see only the kept slices, and put its result back among zeros."""
    old, env = dict(checker.old), dict[fx.Node, Any]()
    mending = Mending(gated, node, old, env, checker.expected(node), checker.masks, lambda name, axis: False)
    for source in node.all_input_nodes:
        value = checker.old.get(source.name)
        if isinstance(value, Labels):
            picked = _each_axis(gated, node, source, checker.masks(value), put_back=False)
            node.replace_input_with(source, picked)
            env[picked] = checker.restrict(value)
            old[picked.name] = value
        else:
            env[source] = value
    if node.op == "call_module":
        name = f"kept_{node.name}"
        module = narrowed_copy(gated.get_submodule(str(node.target)), checker, prefix=str(node.target))
        resize(module, env.get(mending.source), mending.expected)
        gated.add_module(name, module)
        node.target = name
    preserve(mending)
    users = list(node.users)
    restored = _each_axis(gated, node.next, node, checker.masks(checker.old[node.name]), put_back=True)
    for user in users:
        user.replace_input_with(node, restored)


def _each_axis(
    gated: fx.GraphModule, before: fx.Node, source: fx.Node, masks: list[Tensor], *, put_back: bool
) -> fx.Node:
    """Nodes that select the kept places along every axis of the tensor of `source`, or that put them back."""
    for axis, mask in enumerate(masks):
        if not bool(mask.all()):
            name = f"kept_{source.name}_{axis}_{len(gated._buffers)}"
            gated.register_buffer(name, mask.nonzero().flatten().to(device_of(gated)), persistent=False)
            function, size = (_put_back, (len(mask),)) if put_back else (torch.index_select, ())
            with gated.graph.inserting_before(before):
                index = gated.graph.get_attr(name)
                source = gated.graph.call_function(function, (source, axis, index, *size))
    return source


def _put_back(x: Tensor, axis: int, index: Tensor, size: int) -> Tensor:
    """Zeros of `size` along `axis`, with `x` at the places `index`."""
    shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
    return x.new_zeros(shape).index_copy(axis, index, x)


class Mask(Gate):
    """The oracle's gate: zeroes the positions of removed units; where they are compared, they become minus infinity."""

    def __init__(self, edge: Edge, keep: Flags) -> None:
        super().__init__(edge)
        self.kept = torch.from_numpy(np.append(keep, True)[edge.units])

    def forward(self, x: Tensor, *, padded: bool = False) -> Tensor:
        shape = [1] * x.ndim
        shape[self.dim] = len(self.kept)
        removed = x.new_full((), -math.inf if self.compared else 0.0)
        return torch.where(self.kept.to(x.device).view(shape), x, removed)

    def weigh(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept.to(weight.device), weight, weight.new_zeros(()))
