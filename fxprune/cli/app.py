"""The application: a table of the commands. A command's module is imported when it is called, and torch with it."""

from __future__ import annotations

import shlex
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from fxprune.cli.extras import EXIT_CODES
from fxprune.version import __version__


class Command(NamedTuple):
    """A command: the module of the function of its name, the first line of its help, and an example of its use."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "compress": Command(
        "pruning",
        "Make a model smaller, from scores to the artefact in one go, and report what was achieved.",
        "fxprune compress torchvision:resnet18 --weights resnet18.pt --data images/train --macs 0.6",
    ),
    "score": Command(
        "pruning",
        "Score every unit of a model in one pass over the data, for any number of plans.",
        "fxprune score mynets:build --model-arg depth=20 --weights net.pt --data images/train -o scores.npz",
    ),
    "plan": Command(
        "pruning",
        "Decide from scores which channels to keep; needs no model, and takes no time.",
        "fxprune plan scores.npz --macs 0.6 --round-to 8 -o plan.json",
    ),
    "apply": Command(
        "pruning",
        "Make a model smaller by a plan, and report what was achieved.",
        "fxprune apply mynets:build plan.json --weights net.pt --data images/train -o small.safetensors",
    ),
    "report": Command(
        "inspection",
        "Show the report that an artefact carries; needs no model. Every checksum in the file is compared.",
        "fxprune report small.safetensors --html report.html",
    ),
    "inspect": Command(
        "inspection",
        "Show which channels must be removed together, which layers consume them, and which are kept whole and why.",
        "fxprune inspect timm:resnet18 -o groups.svg",
    ),
    "sweep": Command(
        "sweeping",
        "Prune at many tolerances or budgets from one score file: a table, a plot, and the Pareto front.",
        "fxprune sweep mynets:build --weights net.pt --scores scores.npz --macs 0.8,0.6,0.4 --data images/train "
        "--eval-data images/val",
    ),
    "demo": Command(
        "demo",
        "Train a residual network on 8 x 8 digits, score it once and prune it at a row of tolerances.",
        "fxprune demo --alphas 0,0.1 --epochs 10",
    ),
}


class Deferred(TyperCommand):
    """A command of which the list of commands needs no more than name and summary."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """The context of the whole command."""
        return loaded(str(self.name)).make_context(*args, **options)


class Group(TyperGroup):
    """All commands, deferred; each is handed the line that was typed, as `obj` of its context."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, command in COMMANDS.items():
            self.add_command(Deferred(name, help=command.summary))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the arguments before they are taken apart."""
        ctx.obj = shlex.join(("fxprune", *args))
        return super().parse_args(ctx, args)


def loaded(name: str) -> Any:
    """A command with its options; its module is imported."""
    from fxprune.cli.commands import add

    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    add(one, getattr(import_module(f"fxprune.cli.{COMMANDS[name].module}"), name), COMMANDS[name].example)
    return typer.main.get_command(one)


app = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Structured pruning of PyTorch models as a torch.fx compiler pass.

    compress does all at once. score, plan and apply are its stages: scores are computed once, for any number of plans.
    inspect, report and sweep show which channels can be removed, which were, and at what cost.
    """
    if show_version:
        typer.echo(f"fxprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
