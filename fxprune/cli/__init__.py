"""The command line. It needs typer, which comes with the extra `cli`; this file does without, to say so."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

CLI_EXTRA = {"typer": "typer"}  # module: distribution
DEMO_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
PLOT_EXTRA = {"matplotlib": "matplotlib"}
INTERRUPTED = 130


def main() -> None:
    """Run the command line; the entry point of `fxprune` and of `python -m fxprune`."""
    message = missing_message("fxprune's command line", CLI_EXTRA, "cli")
    if message:
        sys.exit(message)
    try:
        build_app()()
    except KeyboardInterrupt:  # between commands: while modules are imported, say
        sys.exit(INTERRUPTED)


def build_app() -> "typer.Typer":
    """The typer application, built here and not at import because typer comes with an extra."""
    from fxprune.cli.app import app

    return app


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Those of `modules` that are not installed, without importing any.

    >>> missing_modules(["json", "no_such_module"])
    ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def missing_message(what: str, needed: dict[str, str], extra: str) -> str:
    """What to tell a user whose installation lacks some of the modules `needed`; empty where all are there.

    >>> print(missing_message("The demo", {"no_such_module": "scikit-learn"}, "demo"))
    The demo needs scikit-learn, which this Python does not have.
    It comes with the extra demo: pip install 'fxprune[demo]', or in a checkout pip install '.[demo]'.
    >>> missing_message("The demo", {"json": "json"}, "demo")
    ''
    """
    missing = [needed[module] for module in missing_modules(needed)]
    if not missing:
        return ""
    return (
        f"{what} needs {' and '.join(missing)}, which this Python does not have.\n"
        f"{'It comes' if len(missing) == 1 else 'They come'} with the extra {extra}: pip install 'fxprune[{extra}]', "
        f"or in a checkout pip install '.[{extra}]'."
    )
