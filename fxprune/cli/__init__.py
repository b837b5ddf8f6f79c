"""The command line. It needs typer, of the extra `cli`; this file imports without it, to say that it is missing."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer
from fxprune.cli.extras import CLI_EXTRA, INTERRUPTED, missing_message


def main() -> None:
    """Run the command line; the entry point of `fxprune` and of `python -m fxprune`."""
    message = missing_message("fxprune's command line", CLI_EXTRA, "cli")
    if message:
        sys.exit(message)
    try:
        build_app()()
    except KeyboardInterrupt:  # between commands, for example while modules are imported
        sys.exit(INTERRUPTED)


def build_app() -> "typer.Typer":
    """The typer application, built here and not at import because typer comes with an extra."""
    from fxprune.cli.app import app

    return app
