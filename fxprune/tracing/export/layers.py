"""Folding: the ops of one call of a whole layer become a call of its module again."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram, ModuleCallSignature
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError
from fxprune.tracing.export.ops import is_assertion
from fxprune.tracing.hooks import hooked
from fxprune.tracing.symbolic import SymbolicTracer

Names = dict[str, fx.Node]
_tracepoint = torch.ops.higher_order._export_tracepoint
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def layers(model: nn.Module, tracer: SymbolicTracer, prefix: str = "") -> Iterator[str]:
    """The paths of all modules that are kept whole, under each of their names: those without hooks."""
    for name, child in model._modules.items():
        path = f"{prefix}{name}"
        if child is not None and not hooked(child) and tracer.is_leaf_module(child, path):
            yield path
        elif child is not None:
            yield from layers(child, tracer, f"{path}.")


def fold(program: ExportedProgram) -> fx.Graph:
    """The program's graph with its layers as call_module nodes, and without checks of sizes."""
    names = {node.name: node for node in program.graph.nodes}
    inline(program.graph_module, names)
    graph: fx.Graph = program.graph
    marks = _take_tracepoints(graph)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for call in _calls(node):
            calls.setdefault(call, []).append(node)
    signatures = {entry.fqn: entry.signature for entry in program.module_call_graph if entry.signature}
    for call, nodes in calls.items():
        path = call.partition("@")[0]
        if call in marks and path in signatures:
            specs = signatures[path].in_spec, signatures[path].out_spec
            signatures[call] = ModuleCallSignature(**marks[call], in_spec=specs[0], out_spec=specs[1])
        if call in signatures and call:
            _fold_call(graph, path, nodes, signatures[call], names)
    drop_checks(graph)
    return graph


def _calls(node: fx.Node) -> Iterator[str]:
    """The calls of modules that a node is a part of: "norm" is the first of norm, "norm@1" the second."""
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        again = re.search(r"@\d+$", key)
        yield path.partition("@")[0] + (again[0] if again else "")


def _fold_call(graph: fx.Graph, path: str, nodes: list[fx.Node], signature: Any, names: Names) -> None:
    """Replace `nodes` by one call_module node; do nothing where an input is unknown or no output is used."""
    inputs = [spec.value if hasattr(spec, "value") else names.get(spec.name, ...) for spec in signature.inputs]
    outputs = [names.get(getattr(spec, "name", "")) for spec in signature.outputs]
    known = [node for node in inputs if isinstance(node, fx.Node)]
    if any(value is ... for value in inputs) or not any(output in nodes for output in outputs):
        return
    order = {node: place for place, node in enumerate(graph.nodes)}
    after = max((order[node] for node in known), default=-1)
    first = next(node for node in nodes if order[node] > after)
    args, kwargs = pytree.tree_unflatten(inputs, signature.in_spec)
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(outputs))), signature.out_spec))
    with graph.inserting_before(first):
        called = graph.create_node("call_module", path, args, kwargs)
        called.meta = dict(nodes[0].meta)
        for keys, place in paths:
            old = outputs[place]
            if old in nodes and old is not None:
                new = _taken(graph, called, keys)
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new)
                names[old.name] = new
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _taken(graph: fx.Graph, value: fx.Node, keys: Any) -> fx.Node:
    """The part of a nested value that lies at `keys`."""
    for key in keys:
        if isinstance(key, pytree.GetAttrKey):
            value = graph.call_function(getattr, (value, key.name))
        else:
            value = graph.call_function(operator.getitem, (value, key.idx if hasattr(key, "idx") else key.key))
    return value


def drop_checks(graph: fx.Graph) -> None:
    """Remove the checks that export adds, and unused numbers."""
    for node in reversed(list(graph.nodes)):
        is_number = isinstance(node.meta.get("val"), _NUMBERS) and node.op == "call_function"
        if not node.users and (is_assertion(node.target) or is_number):
            graph.erase_node(node)


def inline(module: fx.GraphModule, names: Names) -> None:
    """Replace the calls of `with torch.no_grad()` and of a disabled autocast by their graphs.

    Raises CaptureError for other graphs within the graph: torch.cond, scan, autocast.
    """
    for node in list(module.graph.nodes):
        if not isinstance(node.target, HigherOrderOperator) or node.target is _tracepoint:
            continue
        body, operands, graded = _body(node)
        inner = getattr(module, body.target)
        inline(inner, names)
        copies = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), operands, strict=True))
        with module.graph.inserting_before(node):
            results: Any = module.graph.graph_copy(inner.graph, copies)
            if not graded:
                results = fx.node.map_arg(results, partial(_detached, module.graph))
        names |= {new.name: new for old, new in copies.items() if old.op != "placeholder"}
        for user in list(node.users):
            names[user.name] = results[user.args[1]]
            user.replace_all_uses_with(names[user.name])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not body.users:
            module.graph.erase_node(body)


def _take_tracepoints(graph: fx.Graph) -> dict[str, dict[str, list[Any]]]:
    """Remove the marks that export leaves in inlined graphs; gives the inputs and outputs that they mark, by call."""
    marks: dict[str, dict[str, list[Any]]] = {}
    for node in list(graph.nodes):
        if node.target is _tracepoint:
            values = [a if isinstance(a, fx.Node) else ConstantArgument("", a) for a in node.args]
            kind = str(node.kwargs["kind"]).removeprefix("module_call_")
            marks.setdefault(list(_calls(node))[-1], {})[kind] = values
            for user in list(node.users):
                user.replace_all_uses_with(node.args[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
    return marks


def _body(node: fx.Node) -> tuple[Any, Sequence[Any], bool]:
    """The graph that a node runs, its operands, and whether gradients flow through it."""
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        return node.args[1], node.args[2:], bool(node.args[0])
    if name == "wrap_with_autocast" and node.args[2] is False:
        return node.args[4], node.args[5:], True
    raise CaptureError(f"the exported program holds {name}, a graph within the graph: take it out of the forward")


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
