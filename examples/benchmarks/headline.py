"""The picture of README.md: accuracy right after pruning over the MACs that are left, fxprune beside its peers.

    python examples/benchmarks/headline.py        (draws docs/benchmarks/oneshot.json, which oneshot.py measures)

Two colours and a grey that are readable on white and on black; the background is left transparent. Each line has an
id, and each panel's frame, so that a test can read the numbers back from the picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
MODELS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "vgg": "VGG"}
GREY = "#8a8a8a"
LINES = {
    "fxprune": {"label": "fxprune", "color": "#2f81f7", "marker": "o", "linewidth": 3, "zorder": 3},
    "torch-pruning": {"label": "torch-pruning, best of all configurations", "color": "#e5622d", "marker": "s"},
    "network-pruner": {"label": "network-pruner", "color": GREY, "marker": "^"},
}
WHOLE = "not pruned"
PERCENT = (0, 100)
LEFT = (103, 27)  # the axis of the MACs, from the whole model down


def best(runs: Sequence[dict[str, Any]], model: str, tool: str) -> dict[int, float]:
    """The highest accuracy (%) of a tool on a model at each budget (% of the MACs), the whole model first.

    fxprune is drawn as it is by default; of another tool, the best of its configurations at each budget is.
    """
    found: dict[int, float] = {}
    for run in runs:
        drawn = run["method"] in (WHOLE, tool) or (tool != "fxprune" and run["method"].startswith(tool))
        if drawn and (run["stage"], run["model"]) == ("pruned", model):
            for row in run.get("rows", ()):
                if "accuracy" in row:
                    budget = round(100 * row["budget"])
                    found[budget] = max(found.get(budget, 0.0), 100 * row["accuracy"])
    return dict(sorted(found.items(), reverse=True))


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture as SVG; equal runs give equal bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "fxprune", "font.size": 11, "text.color": GREY}
    mpl.rcParams |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, (model, title) in zip(axes, MODELS.items(), strict=True):
        panel.patch.set_gid(f"{model}-frame")
        for tool, style in LINES.items():
            points = best(runs, model, tool)
            if len(points) > 1:
                panel.plot(*zip(*points.items(), strict=True), gid=f"{model}-{tool}", **style)
        panel.set(title=title, xlabel="MACs left (%)", xlim=LEFT, ylim=PERCENT)
        panel.grid(color=GREY, alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    handles = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((DOCS / "oneshot.json").read_text(encoding="utf-8")), DOCS / "headline.svg")
