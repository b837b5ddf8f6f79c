"""Objects and models by name: `package.module:callable`, and the models of torchvision and timm."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from torch import nn

from fxprune.cli.extras import missing_modules
from fxprune.cli.preprocessing import IMAGENET, Preparation, of_timm, of_torchvision
from fxprune.errors import FxpruneError, a_kind, either, first_line

_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # how files of weights end


@dataclass(frozen=True, slots=True)
class Built:
    """A model, the size of one of its inputs where that is known, and the builder that an artefact names.

    `images` says how the model's library prepares images for it.
    """

    model: nn.Module
    input_size: tuple[int, ...] | None = None
    builder: str | None = None
    builder_kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: Preparation = IMAGENET


def arguments_of(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Keyword arguments from texts `key=value`: values are Python literals or, where they are none, text.

    >>> arguments_of(["depth=20", "widths=(8, 16)", "name=small", "path=a=b"], "--model-arg")
    {'depth': 20, 'widths': (8, 16), 'name': 'small', 'path': 'a=b'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise typer.BadParameter(f"{pair!r} is no key=value, such as depth=20", param_hint=option)
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[key.strip()] = value
    return found


def object_of(target: str | None, option: str) -> Any:
    """The object at `package.module:name`, or None for None; the working directory is searched, too.

    Raises FxpruneError where there is no such module or name, or the module fails when it is imported.
    """
    if target is None:
        return None
    if not _TARGET.fullmatch(target):
        raise typer.BadParameter(_no_name(target, option), param_hint=option)
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            known = [*_COLLECTIONS, *(path.stem for path in Path.cwd().glob("*.py"))]
            raise FxpruneError(
                f"{target}: there is no module {error.name} in {Path.cwd()} or installed"
                f"{did_you_mean(str(error.name), known)}"
            ) from error
        raise FxpruneError(f"{target}: {module} cannot be imported: {told_with_line(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise FxpruneError(f"{target}: {module} has no {name}{did_you_mean(name, dir(found))}")
        found = getattr(found, name)
    return found


def _no_name(target: str, option: str) -> str:
    """The message for a text that is no package.module:callable, for which a model may be meant."""
    if option != "MODEL":
        return f"{target!r} names nothing: write package.module:callable"
    if Path(target).suffix in _WEIGHTS:
        return f"{target!r} is a file: name the model first, and the file by --weights"
    models: dict[str, Callable[[str], Any]] = {"torchvision": _has_torchvision, "timm": _has_timm}
    found = [f"{name}:{target}" for name, has in models.items() if has(target)]
    if found:
        return f"{target!r} names no callable: did you mean {either(found)}?"
    return f"{target!r} names nothing: write torchvision:NAME, timm:NAME or package.module:callable"


def _has_torchvision(name: str) -> bool:
    return name in importlib.import_module("torchvision.models").list_models()


def _has_timm(name: str) -> bool:
    return not missing_modules(["timm"]) and bool(importlib.import_module("timm").is_model(name))


def called(target: str, option: str, arguments: Mapping[str, Any]) -> Any:
    """The result of the callable `target`. Raises FxpruneError, with the place in its code, where it fails."""
    found = object_of(target, option)
    if not callable(found):
        raise FxpruneError(f"{target} is {a_kind(found)}, which cannot be called: name a function or a class")
    return guarded(found, target, arguments)


def guarded(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """The result of a function of the caller's. Raises FxpruneError where it fails."""
    try:
        return function(**arguments)
    except FxpruneError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        unknown = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
        close = did_you_mean(unknown[1], _parameters(function)) if unknown else ""
        raise FxpruneError(f"{name}({given}) fails: {told_with_line(error)}{close}") from error


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    """The names of a function's parameters, as far as they are known."""
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):
        return ()


def build(target: str, arguments: Mapping[str, Any]) -> Built:
    """The model of a name. Raises FxpruneError where it cannot be built."""
    collection, _, name = target.partition(":")
    make = _COLLECTIONS.get(collection)
    built = make(name, arguments) if make else _from_callable(target, arguments)
    if not isinstance(built.model, nn.Module):
        raise FxpruneError(
            f"{target} gives {a_kind(built.model)}, not a torch.nn.Module: name a callable that builds one"
        )
    return built


def _from_callable(target: str, arguments: Mapping[str, Any]) -> Built:
    found = object_of(target, "MODEL")
    if isinstance(found, nn.Module):
        if arguments:
            raise FxpruneError(f"{target} is a model already, and takes no --model-arg {next(iter(arguments))}")
        return Built(found)
    return Built(called(target, "MODEL", arguments), None, *_recipe(target, arguments))


def _from_torchvision(name: str, arguments: Mapping[str, Any]) -> Built:
    models = importlib.import_module("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise FxpruneError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
    if isinstance(weights := arguments.get("weights"), str) and name in models.list_models(module=models):
        kind = models.get_model_weights(name)
        if weights.removeprefix(f"{kind.__name__}.") not in kind.__members__:
            raise FxpruneError(
                f"torchvision:{name} has no weights {weights!r}; it has {', '.join(kind.__members__)}"
                f"{did_you_mean(weights, kind.__members__)}"
            )
    model = guarded(models.get_model_builder(name), f"torchvision:{name}", arguments)
    side = _SIDES.get(name, 224)
    size = (3, side, side) if name in models.list_models(module=models) else None
    recipe = _recipe("torchvision.models:get_model", {"name": name, **arguments})
    return Built(model, size, *recipe, of_torchvision(name, arguments))


def _from_timm(name: str, arguments: Mapping[str, Any]) -> Built:
    if missing_modules(["timm"]):
        raise FxpruneError(f"timm:{name} needs timm, which this Python does not have: pip install timm")
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(name):
        raise FxpruneError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    model = guarded(timm.create_model, f"timm:{name}", {"model_name": name, **arguments})
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    recipe = _recipe("timm:create_model", {"model_name": name, **arguments})
    return Built(model, size and tuple(size), *recipe, of_timm(name, model))


_COLLECTIONS = {"torchvision": _from_torchvision, "timm": _from_timm}
_SIDES = {"inception_v3": 299}  # of the square images that a model of torchvision takes, where not 224


def _recipe(target: str, arguments: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The builder and its arguments for an artefact; none where JSON cannot hold the arguments."""
    try:
        same = json.loads(json.dumps(arguments)) == arguments
    except (TypeError, ValueError):
        same = False
    return (target, arguments) if same else (None, {})


def told_with_line(error: Exception) -> str:
    """An error of the caller's code, and the line where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = not frames or frames[-1].filename == __file__  # a call that fails in no code of the caller's
    place = "" if own else f" (line {frames[-1].lineno} of {frames[-1].filename})"
    return f"{type(error).__name__}: {first_line(error)}{place}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names that are close to it, if any."""
    close = difflib.get_close_matches(name, [entry for entry in known if not entry.startswith("_")], n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
