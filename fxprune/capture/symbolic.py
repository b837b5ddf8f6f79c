"""The first way to a graph: torch.fx symbolic tracing, with a leaf policy of our own."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.nn.utils import rnn

from fxprune.capture.graph import ModelGraph, must_be_none
from fxprune.errors import CaptureError
from fxprune.example import as_call
from fxprune.rules.table import module_class

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}
_WHOLE = (
    rnn.pack_padded_sequence,
    rnn.pad_packed_sequence,
    torch.zeros,
    torch.ones,
    torch.arange,
)  # nodes, under whatever name


class SymbolicTracer(fx.Tracer):
    """Opens everything but the modules of torch.nn and those that have a rule of their own."""

    proxy_buffer_attributes = True
    record_stack_traces = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_WHOLE)
        self._autowrap_search += [torch, rnn]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _CONTAINERS):
            return False
        owner = next(cls for cls in type(m).__mro__ if "forward" in vars(cls))
        return module_class(m) is not None or owner.__module__.startswith("torch.nn")


def trace(model: nn.Module, example: Any) -> ModelGraph:
    """Trace `model`, a copy of our own in eval mode, and return its graph.

    Arguments of the forward that the example leaves out are fixed at their defaults.

    Raises CaptureError, with the line of the model, where tracing fails.
    """
    _check_names(model)
    _register_constants(model)
    left_out = _left_out(model, example)
    try:
        graph = SymbolicTracer().trace(model, concrete_args=left_out)
    except Exception as error:
        raise CaptureError(
            f"tracing {type(model).__name__} fails with {type(error).__name__}: {error} (at {_user_line(error)}). "
            "Use tensor operations in place of Python control flow on tensor values, or register a rule for the module "
            "that holds it with fxprune.rules.rule, so that it stays whole"
        ) from error
    _register_constants(model)
    for node in graph.nodes:
        if node.target is _assert_is_none:
            node.target, node.args = must_be_none, (node.args[0], str(node.args[0]))
        if node.target in _WHOLE:
            node.meta.pop("is_wrapped", None)  # fx would wrap it under a dotted name, and later traces would fail
    captured = ModelGraph(model, graph, type(model).__name__)
    _use_dropout_modules(captured)
    return captured


def _check_names(model: nn.Module) -> None:
    """Raise where a child or parameter is called as something that every GraphModule has."""
    for name in (*model._modules, *model._parameters, *model._buffers):
        if isinstance(inspect.getattr_static(fx.GraphModule, name, None), property) or name == "meta":
            raise CaptureError(
                f"{type(model).__name__} has a child called {name!r}, a name that torch.fx.GraphModule keeps: "
                "rename it, or wrap the model in a module of its own"
            )


def _register_constants(model: nn.Module) -> None:
    """Make tensors kept as plain attributes buffers outside the state_dict: these move and narrow with the rest."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)


def _left_out(model: nn.Module, example: Any) -> dict[str, Any]:
    """The parameters of the forward that `example` does not give, with their defaults."""
    args, kwargs = as_call(example)
    signature = inspect.signature(model.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"the example does not fit {type(model).__name__}.forward{signature}: {error}. "
            "Give a tensor, a tuple of the positional arguments, or a dict of the named ones"
        ) from error
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.kind in plain
    }


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that lies outside torch and fxprune."""
    libraries = tuple(str(package.__file__).removesuffix("__init__.py") for package in (torch, torchvision))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries[:1])]
    frames = [f for f in frames if f.filename != __file__ and "<eval_with_key>" not in f.filename]
    if not frames:
        return "a line inside torch"
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def _use_dropout_modules(graph: ModelGraph) -> None:
    """Replace functional dropouts, whose `training` flag tracing has fixed, by modules that follow the model's mode."""
    for node in list(graph.graph.nodes):
        kind = _DROPOUTS.get(node.target) if node.op == "call_function" else None
        if kind is None:
            continue
        bound = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        name = f"{node.name}_module"
        graph.add_module(name, kind(bound.arguments["p"]).eval())
        node.op, node.target, node.args, node.kwargs = "call_module", name, (bound.arguments["input"],), {}
    graph.recompile()
