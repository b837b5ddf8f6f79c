"""The application: every command, with an example of its use."""

from __future__ import annotations

from typing import Annotated

import typer

from fxprune.cli.commands import EXIT_CODES, Function, TypedLine, add
from fxprune.cli.demo import demo
from fxprune.cli.inspection import inspect, report
from fxprune.cli.pruning import apply, compress, plan, score
from fxprune.cli.sweeping import sweep
from fxprune.version import __version__

EXAMPLES: dict[Function, str] = {
    compress: "fxprune compress torchvision:resnet18 --weights resnet18.pt --data images/train --macs 0.6",
    score: "fxprune score mynets:build --model-arg depth=20 --weights net.pt --data images/train -o scores.npz",
    plan: "fxprune plan scores.npz --macs 0.6 --round-to 8 -o plan.json",
    apply: "fxprune apply mynets:build plan.json --weights net.pt --data images/train -o small.safetensors",
    report: "fxprune report small.safetensors --html report.html",
    inspect: "fxprune inspect timm:resnet18 -o groups.svg",
    sweep: "fxprune sweep mynets:build --weights net.pt --scores scores.npz --macs 0.8,0.6,0.4 --data images/train "
    "--eval-data images/val",
    demo: "fxprune demo --alphas 0,0.1 --epochs 10",
}

app = typer.Typer(cls=TypedLine, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


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


for command, example in EXAMPLES.items():
    add(app, command, example)
