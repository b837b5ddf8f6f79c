"""The extras that parts of the command line need, and the message where one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from fxprune.caller.installation import install

CLI_EXTRA = {"typer": "typer"}  # module: distribution
DEMO_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
PLOT_EXTRA = {"matplotlib": "matplotlib"}
INTERRUPTED = 130
EXIT_CODES = "Exit codes: 0 done, 1 an error (its message is on stderr), 2 wrong usage, 130 interrupted by Ctrl-C."


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Those of `modules` that are not installed, without importing any.

    >>> missing_modules(["json", "no_such_module"])
    ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def missing_message(what: str, needed: dict[str, str], extra: str) -> str:
    """The message for an installation that lacks some of the modules `needed`; empty where it has all.

    >>> print(missing_message("The demo", {"no_such_module": "scikit-learn"}, "demo"))
    The demo needs scikit-learn, which this Python does not have.
    It comes with the extra demo: pip install ...[demo]'.
    >>> missing_message("The demo", {"json": "json"}, "demo")
    ''
    """
    missing = [needed[module] for module in missing_modules(needed)]
    if not missing:
        return ""
    return (
        f"{what} needs {' and '.join(missing)}, which this Python does not have.\n"
        f"{'It comes' if len(missing) == 1 else 'They come'} with the extra {extra}: {install(extra)}."
    )
