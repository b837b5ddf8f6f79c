"""The label interpreter: runs a graph on labels, node by node, by the rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.caller.meta import CPU
from fxprune.caller.meta_calls import call_on_meta, method
from fxprune.caller.source_lines import HOMES
from fxprune.caller.tensors import attribute_at
from fxprune.errors import UnsupportedOpError
from fxprune.rules.arguments import Call
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels
from fxprune.rules.table import INDEXED, RAGGED, RULES, describe, key_of
from fxprune.rules.vocabulary import FILLS
from fxprune.tracing.graph import captured_of, must_be
from fxprune.tracing.in_place import is_in_place, viewed

Unknown = Literal["error", "freeze"]


def step(ctx: Context, node: fx.Node, *, unknown: Unknown = "error") -> Any:
    """The value of one node, given those of its inputs in `ctx.env`.

    Raises UnsupportedOpError where the node's operation has no rule and `unknown` is "error".
    """
    ctx.node = node
    args, kwargs = map_arg((node.args, node.kwargs), ctx.env.__getitem__)
    if node.op == "placeholder":
        return pytree.tree_map_only(TensorSpec, lambda spec: Labels(spec.shape), ctx.spec())
    if node.op == "get_attr":
        return _attribute(ctx, node)
    if node.op == "output":
        return ctx.opaque("it is the model's output", args[0]) and None
    if isinstance(node.target, type):
        return _container(node.target, args, kwargs)
    inputs = labels_in((args, kwargs))
    if node.op != "call_module" and node.target not in FILLS and all(_is_known(x) for x in inputs):
        return _computed(ctx, node, args, kwargs)
    return None if node.target is must_be else _called(ctx, node, args, kwargs, unknown)


def _called(ctx: Context, node: fx.Node, args: Any, kwargs: Any, unknown: Unknown) -> Any:
    """The value of a call."""
    if key_of(node, ctx.graph) not in RULES or ctx.is_given_up():
        return _without_rule(ctx, node, labels_in((args, kwargs)), unknown)
    return _by_rule(ctx, node, args, kwargs)


def _by_rule(ctx: Context, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the rule of the node's operation gives, with the numbers where all inputs have some."""
    key, inputs = key_of(node, ctx.graph), labels_in((args, kwargs))
    for plane in (plane for x in inputs for plane in x.planes if plane.ragged and RULES[key] not in RAGGED):
        ctx.tie(*plane.columns)
    if RULES[key] not in INDEXED:
        ctx.freeze_numbered(inputs)
    ctx.call = Call(key, (ctx.module(), *args) if node.op == "call_module" else args, kwargs).by_position()
    value = RULES[key](ctx, *ctx.call.args, **ctx.call.kwargs)
    if is_in_place(node.target) and inputs:
        _forget_numbers(ctx, node.all_input_nodes[0])
    elif node.op != "call_module" and inputs and all(x.value is not None for x in inputs):
        return _with_numbers(value, _computed(ctx, node, args, kwargs))
    return value


def _container(kind: Any, args: Any, kwargs: Any) -> Any:
    """The labels in an instance of a container class: a named tuple, or its fields by name."""
    return kind(*args, **kwargs) if issubclass(kind, tuple) else kwargs


def _without_rule(ctx: Context, node: fx.Node, inputs: list[Labels], unknown: Unknown) -> Any:
    """A value without labels of an operation without a rule; all that it touches is frozen, if `unknown` allows it."""
    is_leaf = node.op == "call_module" and node.target in captured_of(ctx.graph).leaves
    if unknown == "error" and not is_leaf and ctx.touches_channels():
        raise UnsupportedOpError(_no_rule(ctx, node))
    own = _own_labels(ctx) if node.op == "call_module" else []
    name = describe(key_of(node, ctx.graph))
    return ctx.opaque(f"{node.target} is kept whole as a leaf" if is_leaf else f"no rule for {name}", inputs, own)


def _forget_numbers(ctx: Context, written: fx.Node) -> None:
    """The numbers of a constant that is written into are not known any more."""
    for node in (written, viewed(written)):
        if isinstance(known := ctx.env.get(node), Labels) and known.planes:
            ctx.env[node] = replace(known, value=None)


def _with_numbers(value: Any, computed: Any) -> Any:
    """Labels with the numbers of a constant that a rule does not give."""
    leaves, tree = pytree.tree_flatten(value)
    known = pytree.tree_leaves(computed)
    if len(known) != len(leaves):
        return value
    pairs = zip(leaves, known, strict=True)
    return pytree.tree_unflatten([replace(x, value=y.value) if _are_alike(x, y) else x for x, y in pairs], tree)


def _are_alike(x: Any, y: Any) -> bool:
    return isinstance(x, Labels) and isinstance(y, Labels) and x.shape == y.shape


def _is_known(x: Labels) -> bool:
    return x.value is not None and not x.planes


def _computed(ctx: Context, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run a node for real: it works on numbers and known constants only."""
    args, kwargs = pytree.tree_map_only(Labels, lambda x: x.value, (args, kwargs), is_leaf=_is_shape)
    with torch.no_grad():
        function: Any = method(str(node.target)) if node.op == "call_method" else node.target
        value = call_on_meta(function, args, kwargs, CPU)
    return pytree.tree_map_only(Tensor, lambda t: Labels(tuple(t.shape), value=t), value, is_leaf=_is_shape)


def _is_shape(value: Any) -> bool:
    """Whether a value is a shape, of which pytree would make a plain tuple, without its methods."""
    return isinstance(value, torch.Size)


def _attribute(ctx: Context, node: fx.Node) -> Any:
    found = ctx.parameter(str(node.target))
    if found is not None:
        return found
    return attribute_at(ctx.graph, str(node.target))


def _own_labels(ctx: Context) -> list[Labels]:
    """The parameters of the module that the current node calls."""
    path = str(ctx.node.target)
    return labels_in([ctx.parameter(f"{path}.{name}") for name, _ in ctx.module().named_parameters()])


def _no_rule(ctx: Context, node: fx.Node) -> str:
    """The message for an operation without a rule."""
    name, kind = describe(key_of(node, ctx.graph)), type(ctx.graph).__name__
    if hasattr(torch.nn, kind) and not any(ctx.graph.children()):
        return (
            f"the model is a single {kind} of torch.nn, traced into {name}, for which there is no rule: wrap it in "
            f"a module of your own, or in torch.nn.Sequential({kind}(...))"
        )
    return (
        f"no rule says what {name} ({named(node)}) does to channels: register one with "
        '@fxprune.rules.rule(...), or pass unknown="freeze" to keep the channels that it touches whole'
    )


def named(node: fx.Node) -> str:
    """A node by its name, and where in the model's source it comes from."""
    return f"node {node.name}, {_line(node)}"


def _line(node: fx.Node) -> str:
    frames = (line.strip() for line in str(node.stack_trace or "").splitlines())
    places = [frame for frame in frames if frame.startswith('File "') and not any(home in frame for home in HOMES)]
    if places:
        return places[-1]
    owners = list((node.meta.get("nn_module_stack") or {}).values())
    return f"in the forward of {owners[-1][1].__qualname__} {owners[-1][0]!r}".rstrip() if owners else "in the model"
