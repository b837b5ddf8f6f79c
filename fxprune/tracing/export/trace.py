"""The third way to a graph: the program of torch.export."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call
from fxprune.caller.interrupts import uninterrupted
from fxprune.caller.isolation import attributes_restored
from fxprune.caller.meta import lacking_numbers
from fxprune.errors import CaptureError, first_line
from fxprune.tracing.checks import Entry
from fxprune.tracing.export.graph import Builder
from fxprune.tracing.export.layers import layers
from fxprune.tracing.graph import RECORD, Captured, ModelGraph, must_be
from fxprune.tracing.hooks import remove_hooks
from fxprune.tracing.in_place import is_in_place
from fxprune.tracing.symbolic import SymbolicTracer, register_constants

Shapes = Callable[[Tensor, int], Any]
_UNLIMITED = 1 << 31  # a size beyond which torch.export sets no limit
INTRICATE = 16  # operations by which a size may follow from those of the inputs: the time of torch.export explodes


class _IntricateError(Exception):
    """A size follows from those of the inputs by too many operations."""


def trace(
    model: nn.Module, example: Any, *, concrete_args: Mapping[str, Any] | None = None, leaves: Sequence[Entry] = ()
) -> ModelGraph:
    """The graph of `model`, a copy of our own in eval mode.

    Its inputs may have other sizes wherever the model allows it; only another number of samples where sizes in the
    model follow from theirs in intricate ways, as those of windows do. Arguments that the example leaves out are fixed
    at their defaults.

    Raises CaptureError, with the line of the model, where torch.export fails or PyTorch has no function for an op.
    """
    register_constants(model)
    if concrete_args:
        model.forward = partial(model.forward, **concrete_args)
    tracer = SymbolicTracer(leaves=leaves)
    whole = set(layers(model, tracer))
    with attributes_restored(model), _plain_output(model) as records, _exportable(model, example) as inputs:
        program = _exported(model, inputs, whole)
    args, kwargs = as_call(example)
    given = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    graph = Builder(program, model, records[-1] if records else None).build(_in_order(model, given, kwargs))
    remove_hooks(model)
    _drop_unused(graph)
    captured = ModelGraph(model, graph, type(model).__name__)
    beside = list(_decided_beside(program))
    captured.meta[RECORD] = Captured(
        leaves=tuple(tracer.kept),
        by_batch=frozenset(ratio for axis, ratio in beside if axis == 0),
        by_length=frozenset(ratio for axis, ratio in beside if axis > 0),
        by_layout=True,
    )
    return captured


def _decided_beside(program: ExportedProgram) -> Iterator[tuple[int, float]]:
    """Axes of inputs, each with how many times as large as in the example it is where a program no longer holds."""
    own = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    for node in program.graph.find_nodes(op="placeholder"):
        shape = getattr(node.meta.get("val"), "shape", ()) if node.name in own else ()
        for axis, size in enumerate(shape):
            yield axis, 1.0  # what Python makes of a size, such as a text, leaves no trace
            limits = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if limits is None:
                continue
            symbol, length = size.node.expr, size.node.hint
            known = [int(number) / length for number in (limits.lower, limits.upper) if 2 < number < _UNLIMITED]
            for expr in (guard.expr for guard in size.node.shape_env.guards):
                if expr.is_Relational and expr.free_symbols == {symbol}:
                    one, other = (float(side.subs(symbol, length)) for side in expr.args)
                    known += [one / other, other / one] if one > 0 < other else []
            yield from ((axis, ratio) for ratio in known)


def _drop_unused(graph: fx.Graph) -> None:
    """Remove unused nodes (the weights of an attention, say), but for checks and for writes in place."""
    for node in reversed(list(graph.nodes)):
        in_place = is_in_place(node.target) or node.kwargs.get("inplace")
        needed = node.users or in_place or node.target in (must_be, torch._assert)
        if node.op in ("call_function", "call_method") and not needed:
            graph.erase_node(node)


def _in_order(model: nn.Module, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The given arguments in the order in which export flattens them: by position, then by name."""
    kinds = inspect.signature(model.forward).parameters
    starred = [name for name in given if kinds[name].kind is inspect.Parameter.VAR_KEYWORD]
    named = {name: given[name] for name in kwargs if name in given}
    return {name: value for name, value in given.items() if name not in named} | named if not starred else given


@contextmanager
def _exportable(model: nn.Module, example: Any) -> Iterator[Any]:
    """The example to export a model with; where the model has no numbers, both are fake tensors on the CPU.

    (On the meta device, every tensor that the forward makes there would be kept there.)
    """
    if lacking_numbers(model) is None:
        yield example
        return
    mode, made = FakeTensorMode(), dict[int, Tensor]()
    with attributes_restored(model):
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                held = {name: tensor for name, tensor in store.items() if tensor is not None}
                store.update({name: made.setdefault(id(t), _faked(t, mode)) for name, t in held.items()})
        yield pytree.tree_map_only(Tensor, lambda t: _faked(t, mode), example)


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor on the CPU of the same shape; a parameter for a parameter."""
    with mode:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


# -- torch.export ------------------------------------------------------------------------------------------------------


def _exported(model: nn.Module, example: Any, whole: set[str]) -> ExportedProgram:
    """The program, with sizes as free as they can be."""
    batch = next((t.shape[0] for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim), 0)
    several, size = example, max(batch, 2)
    if batch == 1:  # which torch.export takes for a constant
        several = pytree.tree_map_only(
            Tensor, lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == batch else t, example
        )
    attempts: tuple[tuple[Any, Shapes | None], ...] = (
        (several, lambda t, axis: Dim.AUTO),
        (several, lambda t, axis: Dim.AUTO if axis == 0 and t.shape[0] == size else Dim.STATIC),
        (example, None),
    )
    for inputs, shapes in attempts:
        try:
            return _export_layers(model, inputs, shapes, set(whole))
        except Exception as error:  # noqa: BLE001 - whatever torch.export or the user's model raises
            failure = error
    raise CaptureError(f"{type(failure).__name__}: {first_line(failure)}") from failure


def _export_layers(model: nn.Module, example: Any, shapes: Shapes | None, whole: set[str]) -> ExportedProgram:
    """Export with the inputs and outputs of every layer, but for layers whose calls cannot be described."""
    while True:
        odd = set[str]()
        with _watched(model, whole, odd):
            try:
                return _export(model, example, shapes, whole)
            except AssertionError:
                if not odd:
                    raise
        whole -= odd


@uninterrupted
def _export(model: nn.Module, example: Any, shapes: Shapes | None, whole: set[str]) -> ExportedProgram:
    """The program, without the warnings and the log of torch.export."""
    args, kwargs = as_call(example)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        return torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=_dynamic(model, args, kwargs, shapes) if shapes else None,
            strict=False,
            preserve_module_call_signature=tuple(sorted(whole)),
        )


@contextmanager
def _plain_output(model: nn.Module) -> Iterator[list[type]]:
    """Export a dataclass that pytree does not know as a dict; gives the list of the types of such outputs."""
    records: list[type] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not dataclasses.is_dataclass(output) or isinstance(output, type) or type(output) in pytree.SUPPORTED_NODES:
            return output
        records.append(type(output))
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}

    with model.register_forward_hook(hook):
        yield records


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes) -> Any:
    """Which axes of every input tensor torch.export takes for variable."""

    def axes(value: Any) -> Any:
        return {axis: shapes(value, axis) for axis in range(value.ndim)} if isinstance(value, Tensor) else None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(axes, value) for name, value in given.items()}


@contextmanager
def _watched(model: nn.Module, whole: set[str], odd: set[str]) -> Iterator[None]:
    """While exporting, note the layers that are given computed sizes, or arguments that differ from call to call.

    Every layer gives a new value: one that returns its input, as stochastic depth does in eval mode, would not be seen.

    Raises _IntricateError at a size on which torch.export would work for very long.
    """
    specs: dict[str, pytree.TreeSpec] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if specs.setdefault(path, spec) != spec or any(isinstance(leaf, torch.SymInt) for leaf in leaves):
                odd.add(path)
            sizes: Iterator[Any] = chain.from_iterable(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
            for size in sizes:
                if isinstance(size, torch.SymInt) and _operations(size) > INTRICATE:
                    raise _IntricateError(f"{path} is given a size of {size}")

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return torch.ops.aten.alias(output) if any(output is value for value in args) else output

    with ExitStack() as stack:
        for path in whole:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(before(path), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(after))
        yield


def _operations(size: torch.SymInt) -> int:
    """The operations by which a size, or its hardest factor, follows from the inputs' sizes; remainders count twice."""
    from torch.utils._sympy.functions import Mod  # sympy takes a third as long as torch itself

    return max(int(factor.count_ops()) + int(factor.count(Mod)) for factor in size.node.expr.as_ordered_factors())
