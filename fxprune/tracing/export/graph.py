"""From an exported program to a graph like that of symbolic tracing: its names, arguments, outputs and calls."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError, a_kind
from fxprune.tracing.batchnorm import FollowingBatchNorm
from fxprune.tracing.export.layers import fold
from fxprune.tracing.export.ops import Spelling, Unchanged, is_changed, is_creation, spelled
from fxprune.tracing.graph import must_be

_CHECKED = (bool, int, float, str)


class Builder:
    """Translates the nodes of a program, one by one, into a new graph over `model`.

    `record` is the class of an output that the program gives as a dict.
    """

    def __init__(self, program: ExportedProgram, model: nn.Module, record: type | None = None) -> None:
        self.program, self.model, self.record, self.graph = program, model, record, fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.stored = _stored(program, model)

    def build(self, given: dict[str, Any]) -> fx.Graph:
        """The graph, with placeholders for the arguments of the model's forward; `given` are those of the example."""
        nodes = fold(self.program).nodes
        specs = self.program.graph_signature.input_specs
        names = [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]
        inputs = dict(zip(names, self._inputs(given), strict=True))
        for node in list(nodes):
            if node.op == "placeholder" and node.name in inputs:
                self.env[node] = inputs[node.name]
            elif node.op == "output":
                leaves = self._values(node.args[0])
                spec = self.program.call_spec.out_spec
                assert spec is not None
                made = self._structure(pytree.tree_unflatten(leaves, spec))
                self.graph.output(self.graph.call_function(self.record, (), made) if self.record else made)
            elif node.op != "placeholder":
                self.env[node] = self._translated(node)
        return self.graph

    def _translated(self, node: fx.Node) -> Any:
        """The new node, or the value, of a call of the program."""
        if is_creation(node):
            return self._made(node)
        args, kwargs = self._values(node.args), self._values(node.kwargs)
        call: Spelling | Unchanged = Spelling(node.op, node.target, args, kwargs)
        if isinstance(node.target, OpOverload):
            try:
                call = spelled(node.target, args, kwargs)
            except (TypeError, CaptureError) as error:
                raise CaptureError(f"{error} ({node.target}, at {_line(node)})") from error
        if isinstance(call, Unchanged):
            return call.value
        if call.target is F.batch_norm:
            call = self._following(call)
        if call.op == "new_module":
            call = Spelling("call_module", self._add(f"{node.name}_module", call.target.eval()), call.args)
        new = self.graph.create_node(call.op, call.target, call.args, call.kwargs)
        new.meta |= {key: node.meta[key] for key in ("stack_trace", "val") if node.meta.get(key) is not None}
        return new

    def _following(self, call: Spelling) -> Spelling:
        """Batch normalisation as a module, whose mode is that of the BatchNorm that holds the statistics."""
        path, _, name = str(getattr(call.args[1], "target", "")).rpartition(".")
        owner = self.model.get_submodule(path) if name == "running_mean" else None
        if not isinstance(owner, nn.modules.batchnorm._BatchNorm):
            return call
        new = FollowingBatchNorm(*call.args[6:8]).eval()
        return Spelling("call_module", self._add("normalise", new, path), call.args[:5])

    def _made(self, node: fx.Node) -> fx.Node:
        """A tensor made of numbers alone becomes a buffer: it moves and narrows with the rest."""
        name = _constant(self.model, node.target(*node.args, **node.kwargs))  # type: ignore[operator]
        made = self.graph.get_attr(name)
        return self.graph.call_method("clone", (made,)) if is_changed(node) else made

    def _values(self, values: Any) -> Any:
        """Nested arguments with the new nodes in the place of the program's."""
        return fx.node.map_aggregate(values, lambda a: self._value(a) if isinstance(a, fx.Node) else a)

    def _value(self, node: fx.Node) -> Any:
        if node not in self.env and node.op == "placeholder":
            self.env[node] = self.graph.get_attr(self.stored[node.name])
            self.env[node].meta["val"] = node.meta.get("val")
        return self.env[node]

    def _add(self, name: str, module: nn.Module, path: str = "") -> str:
        """Add a module to the model, or to the one at `path`, under a free name; returns where it is."""
        owner = self.model.get_submodule(path)
        while hasattr(owner, name):
            name += "_"
        owner.add_module(name, module)
        return f"{path}.{name}" if path else name

    # -- arguments and outputs -------------------------------------------------------------------------------------

    def _inputs(self, given: dict[str, Any]) -> list[Any]:
        """Placeholders for all parameters of the forward; the leaves of those that the example gives, in order."""
        parameters = sorted(inspect.signature(self.model.forward).parameters.values(), key=_place)
        nodes = {parameter.name: self._placeholder(parameter) for parameter in parameters}
        leaves, counted = [], set[Any]()
        for name, value in given.items():
            keys: Any
            for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
                node, inside = nodes[name], value
                for depth, key in enumerate(keys):
                    if isinstance(inside, (list, tuple)) and (name, keys[:depth]) not in counted:
                        counted.add((name, keys[:depth]))
                        self.graph.call_function(must_be, (node, len(inside), f"len({name})"))
                    at: Any = key.idx if isinstance(key, pytree.SequenceKey) else key.key
                    inside = inside[at]
                    node = self.graph.call_function(operator.getitem, (node, at))
                leaves.append(node)
                self._fix(node, leaf, name)
        for parameter in parameters:
            if parameter.name not in given and parameter.default is not inspect.Parameter.empty:
                self._fix(nodes[parameter.name], parameter.default, parameter.name)
        return leaves

    def _placeholder(self, parameter: inspect.Parameter) -> fx.Node:
        """One argument of the forward; one that is required by keyword may come behind those with defaults."""
        stars = "*" * (_place(parameter) - 1)
        default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
        if not stars and not default and any(node.args for node in self.graph.nodes):
            default = (None,)
        return self.graph.create_node("placeholder", stars + parameter.name, default, name=parameter.name)

    def _fix(self, node: fx.Node, value: Any, name: str) -> None:
        """Check in the graph that an argument that is no tensor has the value that the graph was made for."""
        if value is None or isinstance(value, _CHECKED):
            self.graph.call_function(must_be, (node, value, name))

    def _structure(self, value: Any) -> Any:
        """A nested output as arguments of nodes; named tuples and dataclasses are made by nodes."""
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self._structure(item) for item in value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            filled = {name: self._structure(entry) for name, entry in given.items() if entry is not None}
            return self.graph.call_function(type(value), (), filled)
        if isinstance(value, (tuple, list)):
            return type(value)(self._structure(item) for item in value)
        if isinstance(value, dict):
            return {key: self._structure(item) for key, item in value.items()}
        if value is None or isinstance(value, (fx.Node, *_CHECKED)):
            return value
        raise CaptureError(f"the output holds {a_kind(value)}: give tensors, tuples, lists, dicts or dataclasses")


def _place(parameter: inspect.Parameter) -> int:
    """Arguments by name come second, *args third and **kwargs last, as in symbolic tracing."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return kinds.index(parameter.kind) + 1 if parameter.kind in kinds else 0


def _stored(program: ExportedProgram, model: nn.Module) -> dict[str, str]:
    """Placeholder -> parameter or buffer; constants of the program become buffers of the model."""
    stored = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            stored[spec.arg.name] = str(spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            stored[spec.arg.name] = _constant(model, program.constants[str(spec.target)])
        elif spec.kind is not InputKind.USER_INPUT:
            raise CaptureError(f"the exported program takes {spec.arg.name}, which is no tensor")
    return stored


def _constant(model: nn.Module, tensor: torch.Tensor) -> str:
    """Register a constant as a buffer outside the state_dict; returns its name."""
    name = next(f"constant_{i}" for i in range(len(model._buffers) + 1000) if not hasattr(model, f"constant_{i}"))
    model.register_buffer(name, tensor.detach().clone(), persistent=False)
    return name


def _line(node: fx.Node) -> str:
    """The innermost line of the model's source in the stack of a node."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith('File "')]
    own = [line for line in lines if "/torch/" not in line]
    return (own or lines or ["an unknown line"])[-1]
