"""Where the time of `score` goes: every job does what the one before does, and a part more."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from measure import Table, interleaved, short
from torch import nn

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.scoring.eval_graph import fuse
from fxprune.scoring.loader_pass import ScoringPass
from fxprune.scoring.sampler import Sampler

Work = tuple[nn.Module, cifar.Batches]
COLUMNS = ("network, job", "time", "share of the plain pass", "added by this part")
TITLE = "Parts of the time of score"


def forward(work: Work) -> None:
    """One forward pass over the batches."""
    model, batches = work
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def backward(work: Work) -> None:
    """One forward and one backward pass that reaches every activation, and no weight."""
    model, batches = work
    for images, labels in batches:
        start = images.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(start), labels), start)


def probed(work: Work, *, moments: bool) -> None:
    """The scoring pass on a captured model, with or without the second moments."""
    graph, batches = work
    sampler = Sampler(32, None, 1 << 30, projections=64, seed=0, compares=False, gathers=moments)
    through: Any = partial(ScoringPass.through, graph, "", "network", analyse(graph), sampler, batches)
    through(loss=None, unpack=None, run=None, device=torch.device("cpu"), most=None).run(None, None, progress=False)


def jobs_of(work: Work, plain: Callable[[Work], None]) -> dict[str, Callable[[], object]]:
    """Name -> job; `plain` also takes the gradients of the weights."""
    model, batches = work
    graph: Any = fxprune.capture(model, batches[0][0][:2])
    still, fused = copy.deepcopy(model).requires_grad_(requires_grad=False), copy.deepcopy(graph)
    fuse(fused, analyse(graph).specs)
    fused.requires_grad_(requires_grad=False)
    return {
        "plain pass": partial(plain, work),
        "forward": partial(forward, work),
        "and backward, without gradients of weights": partial(backward, (still, batches)),
        "the same, each BatchNorm fused into its convolution": partial(backward, (fused, batches)),
        "and the gates' gradients": partial(probed, (graph, batches), moments=False),
        "and second moments": partial(probed, (graph, batches), moments=True),
        "score: and capture, groups, ranking": partial(fxprune.score, *work, progress=False),
    }


def measured(works: dict[str, Work], plain: Callable[[Work], None], repeats: int) -> tuple[Table, dict[str, Any]]:
    """A row for each part, network by network: medians, and the share of the plain pass."""
    data: dict[str, Any] = {}
    for name, work in works.items():
        found = interleaved(jobs_of(work, plain), repeats=repeats)
        data[name] = {job: statistics.median(taken) for job, taken in found.items()}
    rows = [row for name, found in data.items() for row in _rows(name, found)]
    note = (
        "The same images, batches and threads as above; medians of three in turns. Each job but the first two contains "
        "the one before it. Fusing saves time; the other parts add time. The gradients of the gates replace those of "
        "the weights; the rest of the backward pass computes the gradients of the activations. Most products of the "
        "wide layers' rows are computed after the pass, in the last part."
    )
    return Table(TITLE, COLUMNS, tuple(rows), note), data


def _rows(name: str, found: dict[str, float]) -> list[tuple[str, ...]]:
    """The rows of one network; the plain pass is what the others are shares of."""
    whole, before, rows = found["plain pass"], 0.0, []
    for job, spent in found.items():
        new = "" if job == "plain pass" else f"{(spent - before) / whole:+.2f}"
        rows.append((f"{name}, {job}", short(spent), f"{spent / whole:.2f}", new))
        before = 0.0 if job == "plain pass" else spent
    return rows
