"""Exporting to ONNX or to a torch.export program; the exported file is run and compared before it replaces another."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.example import as_call, as_fields, batch_length, to_device
from fxprune.caller.files import regular, replacing
from fxprune.caller.installation import install
from fxprune.caller.isolation import device_of, full_float32, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.errors import ExportError, a_kind, error_text, first_line
from fxprune.tracing.agreement import relative_error
from fxprune.tracing.hook_effects import computing_hooks
from fxprune.tracing.hooks import keep_only, plain_copy

TOLERANCE = 1e-4
EXTRA = ("onnx", "onnxscript", "onnxruntime")
Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Export = Callable[[nn.Module, Any, Any, Path], Run]


def export(
    small: nn.Module,
    path: str | PathLike[str],
    example: Any,
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> float:
    """Export a model in eval mode to `path`, and compare the outputs of the file with those of the model.

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
    if suffix not in _EXPORTS:
        raise ExportError(f"{path} ends in {suffix!r}: name a file that ends in {' or '.join(_EXPORTS)}")
    check_packages([Path(path)])
    need_numbers(small, "export", ExportError)
    with undisturbed(), full_float32(), torch.no_grad(), replacing(path, ExportError) as unfinished:
        model = plain_copy(small)
        example = to_device(pytree.tree_map_only(Tensor, Tensor.detach, example), device_of(model))
        rows = batch_length(example) if dynamic_batch else None
        if rows == 0:
            raise ExportError("the example has no tensor of at least one row: pass dynamic_batch=False")
        batches = [example] if rows is None else [example, _longer(example, rows)]
        _check_runs(model, example)
        try:
            keep_only(model, computing_hooks(small, example, {}))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporters about each other
                run = _EXPORTS[suffix](model, batches[-1], _dynamic_shapes(model, batches[-1], rows), unfinished)
            return max(_error(model, run, batch, path, tolerance) for batch in batches)
        except ExportError:
            raise
        except Exception as error:
            fixed = "; dynamic_batch=False fixes the size of the batch" if dynamic_batch else ""
            raise ExportError(
                f"{type(small).__name__} cannot be exported to {path} ({_cause(error)}){fixed}"
            ) from error


def check_packages(paths: Iterable[Path]) -> None:
    """Raise ExportError where a package is missing that writing or running one of these files needs."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing and any(path.suffix == ".onnx" for path in paths):
        raise ExportError(f"exporting to ONNX needs {', '.join(missing)}, of the extra export: {install('export')}")


def _check_runs(model: nn.Module, example: Any) -> None:
    """Raise ExportError where a model does not run on the example."""
    try:
        args, kwargs = _call(model, example)
        model(*args, **kwargs)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run on the example ({error_text(error)}): give one batch as its forward "
            "takes it"
        ) from error


def _program(model: nn.Module, batch: Any, dynamic_shapes: Any, path: Path) -> Run:
    """Write a torch.export program; returns the function that runs the file."""
    torch.export.save(torch.export.export(model, *_call(model, batch), dynamic_shapes=dynamic_shapes), path)
    loaded: Any = torch.export.load(path).module()
    return lambda args, kwargs: loaded(*args, **kwargs)


def _onnx(model: nn.Module, batch: Any, dynamic_shapes: Any, path: Path) -> Run:
    """Write an ONNX file; returns the function that runs it."""
    import onnxruntime

    args, kwargs = _call(model, batch)
    for value in pytree.tree_leaves(as_fields(model(*args, **kwargs))):
        if not isinstance(value, Tensor) and value is not None:
            raise ExportError(
                f"{type(model).__name__} gives {value!r}, {a_kind(value)}, among its outputs, and ONNX has "
                "only tensors: leave it out, make it a tensor, or export to .pt2"
            )
    program = torch.export.export(model, *_call(model, batch), dynamic_shapes=dynamic_shapes)
    torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, taken = program.graph_signature.user_inputs, {entry.name for entry in session.get_inputs()}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = zip(names, pytree.tree_leaves((args, kwargs)), strict=True)
        feed = {name: value.cpu().numpy() for name, value in values if name in taken}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


_EXPORTS: dict[str, Export] = {".onnx": _onnx, ".pt2": _program}


def _call(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, those by name in the order of the signature, with copies of the tensors."""
    args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, batch))
    order = list(inspect.signature(model.forward).parameters)
    return args, dict(sorted(kwargs.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def _longer(example: Any, rows: int) -> Any:
    """The example with three more rows: at least four, because the exporter takes an axis of one for fixed."""
    return pytree.tree_map(lambda t: t[torch.arange(rows + 3) % rows] if _is_batch(t, rows) else t, example)


def _dynamic_shapes(model: nn.Module, batch: Any, rows: int | None) -> Any:
    """The axes of a batch whose size is open, as torch.export takes them; None where all are fixed."""
    if rows is None:
        return None
    size = torch.export.Dim("batch")
    args, kwargs = _call(model, batch)
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return pytree.tree_map(lambda leaf: {0: size} if _is_batch(leaf, rows + 3) else None, dict(given))


def _is_batch(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _error(model: nn.Module, run: Run, batch: Any, path: Any, tolerance: float) -> float:
    """The difference of the outputs of the file and of the model. Raises ExportError where it is too large."""
    args, kwargs = _call(model, batch)
    wanted = _tensors(model(*args, **kwargs))
    error = relative_error(wanted, _tensors(run(*_call(model, batch))))
    if not error <= tolerance:
        raise ExportError(
            f"the outputs of {path} differ from those of {type(model).__name__} by {error:.3g} of their scale, more "
            f"than {tolerance:.3g}: the file was not kept; see docs/deployment.md"
        )
    return error


def _cause(error: BaseException) -> str:
    """The first error of a chain of them: the exporters wrap one in another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in double precision."""
    return [leaf.detach().cpu().double() for leaf in pytree.tree_leaves(as_fields(output)) if isinstance(leaf, Tensor)]
