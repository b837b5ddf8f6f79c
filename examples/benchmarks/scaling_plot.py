"""The plot of the scaling benchmark: seconds over what grows, both on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(
    found: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]], curves: Mapping[str, Any], path: Path
) -> None:
    """A panel for each curve, a line for each job."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), squeeze=False, layout="constrained")
    jobs = list(dict.fromkeys(job for points in found.values() for job in points))
    colours = dict(zip(jobs, mpl.colormaps["tab10"].colors, strict=False))
    for panel, (name, lines) in zip(axes[0], found.items(), strict=True):
        for job, points in lines.items():
            values = [value for value, point in points.items() if "seconds" in point]
            taken = [points[value]["seconds"] for value in values]
            panel.loglog(values, taken, marker="o", color=colours[job], label=job)
        panel.set(xlabel=curves[name].what, title=curves[name].note)
        panel.set_xticks(curves[name].values, labels=[f"{value:,}" for value in curves[name].values])
        low, high = (math.log10(limit) for limit in panel.get_ylim())
        panel.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))  # whole decades: each panel has two ticks at least
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    handles = {text: line for panel in axes[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
