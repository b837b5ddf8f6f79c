"""The commands that show: report, of an artefact, and inspect, of a model's groups."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Group as Lines
from rich.text import Text
from rich.tree import Tree

from fxprune.cli.drawing import SUFFIXES, draw, layers_of
from fxprune.cli.files import check_suffix, check_writable
from fxprune.cli.input_options import DataOptions, File, ModelOptions
from fxprune.cli.named_objects import Built, object_of
from fxprune.cli.output import Output
from fxprune.cli.pruning_options import CouplingOptions, Run
from fxprune.coupling.couple import couple
from fxprune.coupling.groups import Group
from fxprune.errors import FxpruneError
from fxprune.reporting.tables import plain
from fxprune.saving.container import read_artifact
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.part import part_of, with_captured_part

DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
BATCH = 2  # samples of an example made of zeros
Shape = tuple[torch.dtype, tuple[int, ...]]


def report(
    artifact: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A file that `fxprune compress` or `apply` wrote.")
    ],
    output: Output,
    *,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page that needs no network.")] = None,
    compare: Annotated[Path | None, File(help="Another artefact, to show beside this one.")] = None,
) -> dict[str, Any]:
    """Show the report that an artefact carries; needs no model. Every checksum in the file is compared."""
    check_writable(html)
    header, _ = read_artifact(artifact)
    reports = {part.path: part.report for part in header.parts}
    pages = [html] if html and len(reports) == 1 else []
    if html and not pages:
        named = [re.sub(r"[^\w.-]", "_", path) for path in reports]  # a file may say anything
        pages = [html.with_name(f"{html.stem}-{name}{html.suffix}") for name in named]
    for page, found in zip(pages, reports.values(), strict=False):
        found.to_html(page)
    output.show(
        *reports.values(), f"made by {header.made_by}" + (f"; built by {header.builder}" if header.builder else "")
    )
    if pages:
        output.wrote(*pages)
    compared = []
    if compare is not None:
        others = {part.path: part.report for part in read_artifact(compare)[0].parts}
        compared = [reports[path].compare(others[path]) for path in reports if path in others]
        if not compared:
            raise FxpruneError(
                f"{', '.join(reports)} was pruned in one file, and {', '.join(others)} in the other: nothing to compare"
            )
    output.show(*compared)
    return {
        "artifact": str(artifact), "model": header.model, "versions": dict(header.versions),
        "compared": [comparison.to_dict() for comparison in compared],
        "reports": [{"part": path, **found.to_dict()} for path, found in reports.items()],
        "html": [str(page) for page in pages],
    }  # fmt: skip


def inspect(
    model: ModelOptions,
    data: DataOptions,
    chosen: CouplingOptions,
    output: Output,
    *,
    input: Annotated[  # noqa: A002 - the name of the option
        list[str] | None,
        typer.Option(
            metavar="SIZES",
            help="Size of one sample of an input, such as 3,224,224, or int:16 for 16 token numbers; repeat it for "
            "several inputs. By default the first batch of --data, or the usual size of a named model.",
        ),
    ] = None,
    run: Run = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"Also draw the groups; a file that ends in {', '.join(SUFFIXES)}."),
    ] = None,
) -> dict[str, Any]:
    """Show which channels must be removed together, which layers consume them, and which are kept whole and why."""
    check_suffix([out] if out else [], SUFFIXES, "--out")
    check_writable(out)
    shapes = [_shape(text) for text in input or []]
    built = model.build(output)
    loader = data.loader(built, output, model.seed) or [(_example(shapes, built), None)]
    with output.busy("tracing the model"):
        functions = {"unpack": data.unpacking(), "run": object_of(run, "--run")}
        whole = with_captured_part(built.model, loader, model.submodule, tuple(chosen.exclude), **functions)
        graph = cast("ModelGraph", part_of(whole, model.submodule))
        groups = couple(graph, **chosen.coupling())
    if out:
        with output.busy("drawing"):
            draw(graph, groups, out)
    layers = layers_of(graph)
    groups = tuple(
        replace(group, consumers=tuple(dict.fromkeys(layers[name] for name in group.consumers))) for group in groups
    )
    output.show(tree(type(graph).__name__, groups))
    if out:
        output.wrote(out)
    described = [
        {
            "name": group.name, "units": len(group), "frozen": group.frozen, "inexact": group.inexact,
            "sites": {site.name: {"width": site.width, "channels": group.channels(site)} for site in group.sites},
            "readers": list(group.consumers),
        }
        for group in groups
    ]  # fmt: skip
    return {"model": type(graph).__name__, "groups": described} | ({"out": str(out)} if out else {})


def tree(name: str, groups: tuple[Group, ...]) -> Tree:
    """The groups of a model: layers with their widths, consumers, and why a group is kept whole."""
    free = [group for group in groups if group.frozen is None]
    units, whole = sum(map(len, free)), _counted(len(groups) - len(free), "group")
    root = Tree(
        *plain(f"{name}: {_counted(units, 'unit')} in {_counted(len(free), 'group')} can be removed; {whole} whole")
    )
    for group in groups:
        state = f"whole: {group.frozen}" if group.frozen else "prunable"
        state += f", inexactly: {group.inexact}" if group.inexact and not group.frozen else ""
        title = Text().join([
            *plain(group.name, style="bold"), Text(f"  {_counted(len(group), 'unit')}, "),
            *plain(state, style="dim" if group.frozen else "green"),
        ])  # fmt: skip
        branch = root.add(title)
        for site in group.sites:
            branch.add(*plain(f"{site.name}  {group.channels(site)} of {site.width} channels"))
        if group.consumers:
            branch.add(Lines(*plain(f"read by {', '.join(group.consumers)}", style="cyan")))
    return root


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _shape(text: str) -> Shape:
    """The dtype and the sizes that a text such as "int:16" or "3,32,32" names."""
    kind, colon, sizes = text.rpartition(":")
    try:
        return DTYPES[kind if colon else "float"], tuple(int(size) for size in sizes.split(","))
    except (ValueError, KeyError):
        known = ", ".join(DTYPES)
        raise typer.BadParameter(
            f"{text!r} is no size such as 3,224,224, with one of {known} and a colon before it where it is not float",
            param_hint="--input",
        ) from None


def _example(shapes: list[Shape], built: Built) -> Any:
    """A batch of zeros of the sizes given, or of the usual size of the model."""
    usual = [] if built.input_size is None else [(torch.float32, built.input_size)]
    made = [torch.zeros(BATCH, *sizes, dtype=dtype) for dtype, sizes in shapes or usual]
    if not made:
        raise typer.BadParameter("is needed: the size of a sample, such as 3,224,224; or --data", param_hint="--input")
    return made[0] if len(made) == 1 else tuple(made)
