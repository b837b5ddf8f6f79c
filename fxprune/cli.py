"""The command line: `fxprune demo`."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fxprune import __version__

if TYPE_CHECKING:
    import typer

DEMO_EXTRA = {"typer": "typer", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}  # module: distribution
DEMO_FOLDER = Path("fxprune-demo")
DEMO_ALPHAS = "0,0.02,0.05,0.1,0.2,0.3"
DEMO_EPOCHS = 20


def main() -> None:
    """Run the command line; the entry point of `fxprune` and of `python -m fxprune`."""
    missing = missing_modules(DEMO_EXTRA)
    if missing:
        sys.exit(missing_message([DEMO_EXTRA[module] for module in missing]))
    build_app()()


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Those of `modules` that are not installed, without importing any.

    >>> missing_modules(["json", "no_such_module"])
    ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def missing_message(distributions: list[str]) -> str:
    """What to tell a user whose installation lacks `distributions`.

    >>> print(missing_message(["typer", "matplotlib"]))
    fxprune's command line needs typer and matplotlib, which this Python does not have.
    They come with the demo extra: pip install 'fxprune[demo]', or in a checkout pip install '.[demo]'.
    """
    return (
        f"fxprune's command line needs {' and '.join(distributions)}, which this Python does not have.\n"
        "They come with the demo extra: pip install 'fxprune[demo]', or in a checkout pip install '.[demo]'."
    )


def parse_alphas(text: str) -> tuple[float, ...]:
    """The distinct tolerances in `text`, rising; a ValueError names what cannot be one.

    >>> parse_alphas("0.1, 0,0.02")
    (0.0, 0.02, 0.1)
    """
    alphas = set()
    for part in text.split(","):
        try:
            alpha = float(part)
        except ValueError:
            raise ValueError(f"{part.strip()!r} is no number; write alphas as 0,0.05,0.1") from None
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha:g} is outside 0 to 1, the range of a tolerance of difference")
        alphas.add(alpha)
    return tuple(sorted(alphas))


def build_app() -> "typer.Typer":
    """The typer application, built here and not at import because typer comes with the demo extra only."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    ) -> None:
        """Structured pruning of PyTorch models as a torch.fx compiler pass."""
        if show_version:
            typer.echo(f"fxprune {__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = DEMO_FOLDER,
        alphas: Annotated[str, typer.Option(help="Tolerances, separated by commas.")] = DEMO_ALPHAS,
        seed: Annotated[int, typer.Option(help="Seed of split, weights, batches and scores.")] = 0,
        epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = DEMO_EPOCHS,
    ) -> None:
        """Train a residual network on 8 x 8 digits, score it once and prune it at a row of tolerances."""
        from fxprune.demo import run_demo

        try:
            tolerances = parse_alphas(alphas)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--alphas") from error
        run_demo(out, tolerances, seed=seed, epochs=epochs)

    return app
