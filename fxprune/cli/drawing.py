"""The groups of a model as a picture: by Graphviz where its program `dot` is there, else by matplotlib.

Layers and groups are nodes. An arrow leads from a layer to the group that its channels belong to, and from a group to
the layers that read it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from textwrap import shorten

import networkx as nx

from fxprune.caller.files import replacing
from fxprune.cli.extras import PLOT_EXTRA, missing_message
from fxprune.coupling.groups import Group
from fxprune.errors import FxpruneError
from fxprune.tracing.graph import ModelGraph

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("#8dd3c7", "#fdb462", "#80b1d3", "#b3de69", "#fccde5", "#bc80bd", "#ffed6f", "#fb8072")
FROZEN = "#d9d9d9"
ROW = 0.32  # inches a layer takes
DPI = 150
TALLEST = 30000  # pixels of a PNG


def draw(graph: ModelGraph, groups: Iterable[Group], path: Path) -> None:
    """Draw the groups of a graph to a file that ends in one of `SUFFIXES`; it appears whole or not at all.

    Raises FxpruneError where neither Graphviz nor matplotlib is there, or the file cannot be written.
    """
    net = network(graph, groups)
    with replacing(path, FxpruneError) as unfinished:
        if shutil.which("dot"):
            _by_graphviz(net, unfinished)
        elif message := missing_message("Drawing without Graphviz's program dot", PLOT_EXTRA, "demo"):
            raise FxpruneError(message)
        else:
            _by_matplotlib(net, unfinished)


def network(graph: ModelGraph, groups: Iterable[Group]) -> nx.DiGraph:
    """Layers, in the order in which they run, and groups, with arrows from producers to groups to consumers.

    A node has its `text` and `colour`, and `is_group`; an arrow `reads` where it leads to a consumer.
    """
    groups, layer = tuple(groups), layers_of(graph)
    order = {name: index for index, name in enumerate(dict.fromkeys(layer.values()))}
    widths = {site.name: site.width for group in groups for site in group.sites}
    readers = [layer[name] for group in groups for name in group.consumers]
    net: nx.DiGraph = nx.DiGraph()
    for name in sorted(dict.fromkeys([*widths, *readers]), key=lambda name: order.get(name, -1)):
        text = name + (f"  {widths[name]}" if name in widths else "")
        net.add_node(f"layer {name}", text=text, colour="white", is_group=False)
    for index, group in enumerate(groups):
        colour = FROZEN if group.frozen else COLOURS[index % len(COLOURS)]
        why = f"\nwhole: {shorten(group.frozen, 60, placeholder='...')}" if group.frozen else ""
        text = f"{group.name}: {len(group)} units{why}"
        net.add_node(f"group {index}", text=text, colour=colour, is_group=True)
        for site in group.sites:
            net.add_edge(f"layer {site.name}", f"group {index}", reads=False)
        for name in group.consumers:
            net.add_edge(f"group {index}", f"layer {layer[name]}", reads=True)
    return net


def layers_of(graph: ModelGraph) -> dict[str, str]:
    """The name of each node in the model: its module, the parameter that it is or computes with, or its own name."""
    parameters = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    names: dict[str, str] = {}
    for node in graph.graph.nodes:
        own = [str(node.target)] if node.op in ("call_module", "get_attr") else []
        read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        names[node.name] = next((name for name in own or read if own or name in parameters), node.name)
    return names


def dot_of(net: nx.DiGraph) -> str:
    """The picture in Graphviz's language, whose quoted texts are those of JSON."""
    quote = partial(json.dumps, ensure_ascii=False)
    lines = ["digraph groups {", "  rankdir=LR; node [fontname=Helvetica, fontsize=10, style=filled];"]
    for name, node in net.nodes.items():
        shape = "box" if node["is_group"] else "ellipse"
        lines.append(
            f"  {quote(name)} [label={quote(node['text'])}, shape={shape}, fillcolor={quote(node['colour'])}];"
        )
    for start, end, reads in net.edges(data="reads"):
        lines.append(f"  {quote(start)} -> {quote(end)} [style={'dashed' if reads else 'solid'}];")
    return "\n".join([*lines, "}"]) + "\n"


def _by_graphviz(net: nx.DiGraph, path: Path) -> None:
    command = ["dot", f"-T{path.suffix[1:]}", "-o", str(path)]
    done = subprocess.run(command, input=dot_of(net), capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise FxpruneError(f"Graphviz's dot fails with code {done.returncode}: {done.stderr.strip()[:300]}")


def _by_matplotlib(net: nx.DiGraph, path: Path) -> None:
    """Layers in a column on the left, top to bottom as they run; groups on the right, beside their layers."""
    from matplotlib.figure import Figure

    places = positions(net)
    height = max(2.0, ROW * max(-y for _, y in places.values()) + 1) if places else 2.0
    figure = Figure(figsize=(11, height))
    axes = figure.subplots()
    for name, node in net.nodes.items():
        side, shape = ("left", "round") if node["is_group"] else ("right", "square")
        style = {"boxstyle": shape, "facecolor": node["colour"], "edgecolor": "0.4"}
        axes.text(*places[name], node["text"], ha=side, va="center", fontsize=8, bbox=style, zorder=2)
    for start, end, reads in net.edges(data="reads"):
        colour = net.nodes[start if reads else end]["colour"]
        arrow = {"arrowstyle": "-|>", "color": "0.6" if colour == FROZEN else colour, "shrinkA": 6, "shrinkB": 6}
        arrow |= {"linestyle": "--" if reads else "-", "linewidth": 1.4, "connectionstyle": "arc3,rad=0.05"}
        axes.annotate("", places[end], places[start], arrowprops=arrow, zorder=1)
    axes.set(xlim=(-1, 2), ylim=(min((y for _, y in places.values()), default=0) - 1, 1))
    axes.set_title("solid: produces channels of a group; dashed: reads it", fontsize=9, color="0.3")
    axes.axis("off")
    figure.savefig(path, dpi=min(DPI, int(TALLEST / height)), bbox_inches="tight")


def positions(net: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Where each node stands: (0, -row) for layers; (1, y) for groups, near the mean of their layers, a row apart."""
    layers = [name for name, is_group in net.nodes(data="is_group") if not is_group]
    groups = [name for name, is_group in net.nodes(data="is_group") if is_group]
    places = {name: (0.0, -float(row)) for row, name in enumerate(layers)}
    wanted = {name: fmean([places[layer][1] for layer in nx.all_neighbors(net, name)] or [0.0]) for name in groups}
    last = 1.5
    for name in sorted(groups, key=lambda name: -wanted[name]):
        last = min(wanted[name], last - 1.5)
        places[name] = (1.0, last)
    return places
