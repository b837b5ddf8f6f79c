"""Exporting to ONNX or to a torch.export program, read back and compared before the file is there."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.example import as_call, opened, to_device
from fxprune.caller.files import regular, replacing
from fxprune.caller.isolation import device_of, precise, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.errors import ExportError, first_line
from fxprune.rewriting.proof import relative_error
from fxprune.tracing.hook_effects import computing_hooks
from fxprune.tracing.hooks import keep_only, plain_copy

TOLERANCE = 1e-4
_EXTRA = ("onnx", "onnxscript", "onnxruntime")
Runner = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Writer = Callable[..., Runner]


def export(
    small: nn.Module,
    path: str | PathLike[str],
    example: Any,
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> float:
    """Export a model in eval mode to `path`, and compare what the file gives with what the model gives.

    "model.onnx" is written by torch's exporter and run by ONNX Runtime on the CPU (extra `export`); "model.pt2" is a
    `torch.export` program, to be loaded with `torch.export.load(path).module()`. The file appears whole or not at all,
    and only if its outputs are right, with `dynamic_batch` on a batch of another size too.

    Args:
        small: any module; it is not changed.
        path: a file that ends in .onnx or .pt2.
        example: one batch as the forward takes it.
        dynamic_batch: leave the size of the batch open: the first axis of all tensors of the example that have as many
            rows as its first tensor.
        tolerance: of the returned error.

    Returns:
        The largest absolute difference of the outputs, divided by the largest absolute output of the model.

    Raises:
        ExportError: the suffix is unknown, a package is missing, the model cannot be exported, or the outputs differ.
    """
    check(export, locals())
    suffix = regular(path, ExportError, "written").suffix
    write = _WRITERS.get(suffix)
    if write is None:
        raise ExportError(f"{path} ends in {suffix!r}: name a file that ends in {' or '.join(_WRITERS)}")
    if write is _onnx:
        _check_extra()
    need_numbers(small, "export", ExportError)
    with undisturbed(), precise(), torch.no_grad(), replacing(path, ExportError) as unfinished:
        model = plain_copy(small)
        example = to_device(pytree.tree_map_only(Tensor, Tensor.detach, example), device_of(model))
        batches = _batches(example) if dynamic_batch else [example]
        try:
            keep_only(model, computing_hooks(small, example, {}))
            run = write(model, batches[-1], unfinished, dynamic_batch=dynamic_batch)
            return max(_error(model, run, batch, path, tolerance) for batch in batches)
        except Exception as error:
            if isinstance(error, ExportError):
                raise
            fixed = "; dynamic_batch=False fixes the size of the batch" if dynamic_batch else ""
            raise ExportError(
                f"{type(small).__name__} cannot be exported to {path} ({_cause(error)}){fixed}"
            ) from error


def _check_extra() -> None:
    """Raise where a package of the extra is missing."""
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"exporting to ONNX needs {', '.join(missing)}, of the extra export: pip install 'fxprune[export]'"
        )


def _program(model: nn.Module, batch: Any, path: Path, *, dynamic_batch: bool) -> Runner:
    """Write a torch.export program; returns how the file is run."""
    with _quiet():
        torch.export.save(_exported(model, batch, dynamic_batch=dynamic_batch), path)
        loaded: Any = torch.export.load(path).module()
    return lambda args, kwargs: loaded(*args, **kwargs)


def _onnx(model: nn.Module, batch: Any, path: Path, *, dynamic_batch: bool) -> Runner:
    """Write an ONNX file; returns how it is run."""
    import onnxruntime

    _check_outputs(model, batch)
    with _quiet():
        program = _exported(model, batch, dynamic_batch=dynamic_batch)
        torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, taken = program.graph_signature.user_inputs, {entry.name for entry in session.get_inputs()}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = zip(names, pytree.tree_leaves((args, kwargs)), strict=True)
        feed = {name: value.cpu().numpy() for name, value in values if name in taken}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def _check_outputs(model: nn.Module, batch: Any) -> None:
    """Raise where a model gives what an ONNX graph cannot."""
    args, kwargs = _call(model, batch)
    for value in pytree.tree_leaves(opened(model(*args, **kwargs))):
        if not isinstance(value, Tensor) and value is not None:
            raise ExportError(
                f"{type(model).__name__} gives {value!r}, a {type(value).__name__}, among its outputs, and ONNX knows "
                "tensors alone: leave it out, make it a tensor, or export to .pt2"
            )


_WRITERS: dict[str, Writer] = {".onnx": _onnx, ".pt2": _program}


def _exported(model: nn.Module, batch: Any, *, dynamic_batch: bool) -> Any:
    """The program of a model, the size of its batch open or that of the example."""
    args, kwargs = _call(model, batch)
    dynamic = None
    if dynamic_batch:
        rows, size = _rows(batch), torch.export.Dim("batch")
        axes = {True: {0: size}, False: None}
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        dynamic = pytree.tree_map(lambda leaf: axes[_is_batch(leaf, rows)], dict(given))
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)


def _call(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, those by name in the order of the signature, on tensors of their own."""
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, batch))
    order = list(inspect.signature(model.forward).parameters)
    return args, dict(sorted(kwargs.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def _batches(example: Any) -> list[Any]:
    """The example, and one with three rows more: at least four, since the exporter takes an axis of one for fixed."""
    rows = _rows(example)
    return [example, pytree.tree_map(lambda t: t[torch.arange(rows + 3) % rows] if _is_batch(t, rows) else t, example)]


def _rows(example: Any) -> int:
    """The size of the batch: of the first axis of the first tensor."""
    first = next((leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim == 0 or len(first) == 0:
        raise ExportError("the example begins with no tensor of at least one row: pass dynamic_batch=False")
    return len(first)


def _is_batch(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _error(model: nn.Module, run: Runner, batch: Any, path: Any, tolerance: float) -> float:
    """How far the outputs of the file are from those of the model. Raises ExportError where that is too far."""
    args, kwargs = _call(model, batch)
    wanted = _tensors(model(*args, **kwargs))
    error = relative_error(wanted, _tensors(run(*_call(model, batch))))
    if not error <= tolerance:
        raise ExportError(
            f"what was exported to {path} differs from {type(model).__name__} by {error:.3g} of the output's scale, "
            f"more than {tolerance:.3g}: the file was not kept; see docs/deployment.md"
        )
    return error


def _cause(error: BaseException) -> str:
    """The error that began a chain of them: the exporters wrap one in another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, as floats."""
    return [leaf.detach().cpu().double() for leaf in pytree.tree_leaves(opened(output)) if isinstance(leaf, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that the exporters give about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
