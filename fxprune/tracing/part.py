"""A named part of a model, for models that cannot be captured as a whole: its module, its inputs, its replacement."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check_value
from fxprune.caller.batches import Unpack, batch_to_device, batches, model_inputs
from fxprune.caller.example import as_call, to_device
from fxprune.caller.isolation import applied, device_of, isolated_copy, seeded, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.tensors import in_transform
from fxprune.errors import CalibrationError, CaptureError, FxpruneError, error_text, known_names, stage
from fxprune.tracing.capture import capture_around
from fxprune.tracing.checks import Leaves, check_bare
from fxprune.tracing.graph import ModelGraph, is_captured
from fxprune.tracing.hooks import failed_in_hook, without_global_hooks
from fxprune.tracing.outside import outside_restored
from fxprune.tracing.proof.stand_in import check_stands_in

Run = Callable[[Any, Any, Any], Tensor]


def part_of(model: nn.Module, path: str) -> nn.Module:
    """The module of `model` at `path`; the model itself at the empty path.

    Raises FxpruneError where there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    names = known_names(path, modules) or "; it has no modules in it"
    raise FxpruneError(f"submodule is {path!r}, but {type(model).__name__} has no module of that name{names}")


def with_part(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A copy of `model`, sharing nothing with it, in which `new` replaces the part at `path` wherever it stands.

    Raises FxpruneError where a layer or parameter of the part is also held by the rest of the model.
    """
    if not path:
        return new
    part = part_of(model, path)
    _check_apart(model, part, path)
    if isinstance(new, ModelGraph):
        new.take_place_of(part)
    return isolated_copy(model, {id(part): new})


def name_of(model: nn.Module, path: str) -> str:
    """The name of the part in messages: the model's class, and the path in it."""
    return f"{type(model).__name__}.{path}" if path else type(model).__name__


def with_captured_part(
    model: nn.Module,
    loader: Iterable[Any],
    path: str = "",
    exclude: Leaves = (),
    *,
    unpack: Unpack | None = None,
    run: Run | None = None,
    prove: bool = True,
) -> nn.Module:
    """A copy of `model` whose part at `path` is a captured graph; the model as it is where its part is one already.

    With `prove`, the graph is compared with the part on the loader's first batch and on its second, where it has one;
    and so is the copy with the model.
    Raises CaptureError where the part is not run by the loader's first batch, or cannot be captured.
    """
    part = part_of(model, path)
    need_numbers(model, "scoring", CalibrationError)
    if is_captured(part):
        return model
    check_bare(model)
    check_value("model", part)
    with stage("capturing"), undisturbed(), without_global_hooks(), outside_restored(model):
        feed = batches(loader, unpack)
        pairs, other = [next(feed)], None
        example = _inputs_of(model, path, pairs[0], run)
        if prove:
            with suppress(FxpruneError, StopIteration):  # scoring says what is wrong with it
                other = _inputs_of(model, path, second := next(feed), run)
                pairs.append(second)
        whole = with_part(model, path, capture_around(exclude, part, example, other=other, prove=prove))
        if prove and (path or run):

            def call(own: nn.Module, pair: tuple[Any, Any]) -> Any:
                return call_whole(own, *batch_to_device(pair, device_of(own)), run=run)

            check_stands_in(model, whole, path, pairs, call)
        return whole


class _SeenError(Exception):
    """Ends a forward pass once the part's inputs are known."""


def _inputs_of(model: nn.Module, path: str, batch: tuple[Any, Any], run: Run | None) -> Any:
    """The inputs of the first call of the part at `path`, when a copy of `model` runs on a batch in eval mode."""
    if not path and not run:
        return to_device(model_inputs(batch[0], list(inspect.signature(model.forward).parameters)), device_of(model))
    calls: list[tuple[Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if in_transform():
            raise CaptureError(
                f"{name_of(model, path)} is called inside of torch.vmap, or of a transform of torch.func, and its "
                "inputs have no numbers of their own there: name a submodule that holds the transform, or vectorise "
                "the call by hand"
            )
        calls.append(pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))
        raise _SeenError

    with seeded(0), torch.no_grad():
        own = applied(isolated_copy(model), "eval")
        part = part_of(own, path)
        part.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
        part.forward = lambda *args, **kwargs: keep(part, args, kwargs)  # which the whole may call by its name
        try:
            call_whole(own, *batch_to_device(batch, device_of(own)), run=run)
        except _SeenError:
            pass
        except FxpruneError:
            raise
        except Exception as error:
            if not calls:
                raise failed_in_hook(own, error) or CaptureError(
                    f"{type(model).__name__} fails on the loader's first batch ({error_text(error)}) "
                    f"before it calls {name_of(model, path)}: "
                    "pass unpack= to say what its inputs are, or run= to say how it is run"
                ) from error
    if not calls:
        raise CaptureError(
            f"{name_of(model, path)} is not called by a forward pass on the loader's first batch: name a module that "
            "the model calls as model.part(...) or model.part.forward(...), or pass run= to say how the model is run"
        )
    return _example(part_of(model, path), *calls[0])


def call_whole(model: nn.Module, inputs: Any, targets: Any, *, run: Run | None) -> Any:
    """The result of `run` on a copy of a batch, or the model's output where there is no `run`."""
    inputs, targets = pytree.tree_map_only(Tensor, torch.clone, (inputs, targets))
    if run:
        return run(model, inputs, targets)
    args, kwargs = as_call(model_inputs(inputs, list(inspect.signature(model.forward).parameters)))
    return model(*args, **kwargs)


def _example(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as an example: by position, or all by name; those at their defaults are left out."""
    signature = inspect.signature(part.forward)
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind: name for name in bound}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        if kwargs:
            raise CaptureError(
                f"{type(part).__name__}.forward{signature} is called with {', '.join(kwargs)} by name beside *args: "
                "give all arguments by position"
            )
        return args
    more = bound.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {})
    if more:
        return {**bound, **more}
    given = {name: value for name, value in bound.items() if value is not signature.parameters[name].default}
    return tuple(given.values()) if list(given) == list(signature.parameters)[: len(given)] else given


def _check_apart(model: nn.Module, part: nn.Module, path: str) -> None:
    """Raise where the rest of the model holds a module, parameter or buffer of the part."""
    inner = {id(held): name for name, held in _held(part.named_modules())}
    for name, held in _held(model.named_modules(memo={part})):
        if id(held) in inner:
            raise FxpruneError(
                f"{path}.{inner[id(held)]} is also {name}, outside of {path}, where it cannot be narrowed: "
                "name a submodule that holds both, or prune the whole model"
            )


def _held(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, object]]:
    """The modules and their tensors, each with its name."""
    for path, module in modules:
        yield path, module
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor
