"""From a function that takes groups of options to a command of typer, where every option is an argument of its own."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from fxprune.cli.extras import EXIT_CODES
from fxprune.cli.output import Output
from fxprune.cli.ranks import process_group, started_rank

Function = Callable[..., dict[str, Any]]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]


def add(app: typer.Typer, function: Function, example: str) -> None:
    """Make a command of a function, called by the function's name.

    A parameter whose type is a dataclass stands for the options that are its fields. The function shows text through
    its parameter `output`, and returns the content of `--json`.
    """
    app.command(function.__name__, epilog=f"Example: {example}\n\n{EXIT_CODES}")(flattened(function))


def flattened(function: Function) -> Callable[..., None]:
    """A function of single options that calls `function` with groups of them."""
    signature = inspect.signature(function, eval_str=True)
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    def run(**given: Any) -> None:
        other = started_rank() > 0  # the first rank alone speaks and writes
        output = Output(
            json=given.pop("json") and not other, quiet=given.pop("quiet") or other, writes=not other,
            command=given.pop("context").obj,
        )  # fmt: skip
        if os.getcwd() not in sys.path:  # noqa: PTH109 - entries of sys.path are text
            sys.path.insert(0, os.getcwd())  # noqa: PTH109
        with output.session(function.__name__) as content, process_group(function.__name__):
            made: dict[str, Any] = {
                name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})  # type: ignore[operator]
                for name, kind in groups.items()
            }
            content.update(function(**made, **given, output=output))

    parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
    for name, parameter in signature.parameters.items():
        if name in groups:
            own = get_type_hints(groups[name], include_extras=True)
            parameters += [_parameter(field.name, own[field.name], _default(field)) for field in fields(groups[name])]
        elif name != "output":
            parameters.append(_parameter(name, hints[name], parameter.default))
    parameters += [_parameter("json", Json, default=False), _parameter("quiet", Quiet, default=False)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = function.__doc__
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: Field[Any]) -> Any:
    """The default of a field, as typer takes it."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
