"""The plot of the one-shot benchmark: accuracy over the MACs and over the parameters that are left, model by model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_methods import METHODS, WHOLE
from oneshot_models import MODELS

SHARES = {"macs": "MACs left (%)", "params": "parameters left (%)"}


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each model, a line for each method that is drawn; nothing is trained after pruning."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = {(run["model"], run["method"]): run for run in runs if run["stage"] == "pruned" and "rows" in run}
    models = [model for model in MODELS if any(model == name for name, _ in found)]
    drawn = [name for name, method in METHODS.items() if method.drawn and any(name == other for _, other in found)]
    if not drawn:
        return
    lines = [name for name, method in METHODS.items() if method.drawn]
    colours = dict(zip(lines, mpl.colormaps["tab20"].colors, strict=False))
    figure, axes = plt.subplots(2, len(models), figsize=(4 * len(models), 7.5), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        whole = found.get((model, WHOLE), {"rows": []})["rows"]
        for row, (share, label) in enumerate(SHARES.items()):
            panel = axes[row][column]
            for name in drawn:
                if (model, name) in found:
                    panel.plot(
                        *points(found[model, name], whole, share), color=colours[name], label=name, **style(name)
                    )
            panel.set(xlabel=label, title=model if row == 0 else "")
            panel.grid(alpha=0.3)
        axes[0][column].sharey(axes[1][column])
        if whole and whole[0].get("unit") == "perplexity":
            axes[0][column].set(yscale="log", ylabel="perplexity")
            axes[1][column].set(ylabel="perplexity")
    for line in axes:
        line[0].set_ylabel("test accuracy (%)")
    handles = {text: line for panel in axes[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def points(run: dict[str, Any], whole: list[dict[str, Any]], share: str) -> tuple[list[float], list[float]]:
    """Percent that is left, and percent right or the perplexity, from the whole model down."""
    rows = [*whole, *(row for row in run["rows"] if "failed" not in row)]
    factor = 100 if all(row.get("unit", "%") == "%" for row in rows) else 1
    return [100 * row[share] / run["full"][share] for row in rows], [factor * row["accuracy"] for row in rows]


def style(name: str) -> dict[str, Any]:
    """Thick for the method that is bold."""
    bold = METHODS[name].bold
    return {"marker": "o", "markersize": 5 if bold else 3, "linewidth": 3 if bold else 1.2, "zorder": 3 if bold else 2}
