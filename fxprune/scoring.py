"""Scoring: one forward and one backward pass over the loader gives the U-Score and R-Score of every unit."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.batches import Classes, Unpack, batches, class_of_samples, fitted, fitted_example, sample_count
from fxprune.capture import ModelGraph, capture, placeholder_values, rung_of
from fxprune.coupling import Coupling, Exclude, Index, Site, analyse
from fxprune.errors import CalibrationError, PlanError, first_line
from fxprune.gates import Draw, Probe, insert
from fxprune.isolation import device_of, dtype_of, evaluating, undisturbed
from fxprune.plan import Plan, plan_of
from fxprune.signals import separability
from fxprune.tod import balanced, removed
from fxprune.walk import Unknown

FORMAT = 1
Scalars = NDArray[np.float64]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of every prunable unit, and all that a plan needs.

    `propose` and `protect` hold one number a unit (U-Score and R-Score). `groups` are (name, first unit, end) of the
    groups, `sites` the layers with the unit of each channel, `pieces` sets of units of which one at least has
    to stay. `frozen` says why some layers stay whole, `settings` how the model was captured and coupled, and `about`
    how the scores were made. `balanced` are sets of sites that keep the same number of channels each, and
    `larger` pairs of which the first keeps more than the second.
    """

    propose: Scalars
    protect: Scalars
    groups: tuple[tuple[str, int, int], ...]
    sites: tuple[Site, ...]
    pieces: tuple[Index, ...]
    example: Any
    frozen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    balanced: tuple[tuple[str, ...], ...] = ()
    larger: tuple[tuple[str, ...], ...] = ()

    def plan(self, alpha: float = 0.05, *, min_keep: int = 1, round_to: int = 1) -> Plan:
        """The plan at level alpha: every group loses its lowest U-Scores for the largest ToD <= alpha.

        Args:
            alpha: tolerance of difference, 0 <= alpha <= 1, shared by all groups.
            min_keep: the fewest units that a group keeps.
            round_to: the number of units that a group keeps is rounded up to a multiple of this.
        """
        if not 0 <= alpha <= 1:
            raise PlanError(f"alpha is {alpha}; it is a share of units and lies between 0 and 1")
        if min_keep < 1 or round_to < 1:
            raise PlanError(f"min_keep is {min_keep} and round_to is {round_to}; both are at least 1")
        keep = np.ones(len(self.propose), dtype=bool)
        for _, start, end in self.groups:
            part = slice(start, end)
            gone = removed(self.propose[part], self.protect[part], alpha, min_keep=min_keep, round_to=round_to)
            keep[start + gone] = False
        for units in self.pieces:
            if not keep[units].any():
                keep[units[np.argmax(self.propose[units])]] = True
        sites = {site.name: site.units for site in self.sites}
        equal, larger = ([[sites[n] for n in names] for names in sets] for sets in (self.balanced, self.larger))
        keep = balanced(keep, self.propose, equal, larger, round_to=round_to)
        return plan_of(self.sites, keep, self.example, alpha, self.frozen, self.settings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores as a compressed .npz of plain arrays; nothing in it is pickled."""
        header = {
            "fxprune_scores": FORMAT,
            "groups": [list(group) for group in self.groups],
            "sites": [site.name for site in self.sites],
            "pieces": len(self.pieces),
            "example": self.example,
            "frozen": self.frozen,
            "settings": dict(self.settings),
            "about": self.about,
            "balanced": self.balanced,
            "larger": self.larger,
        }
        arrays: dict[str, Any] = {f"site{i}": site.units for i, site in enumerate(self.sites)}
        arrays |= {f"piece{i}": units for i, units in enumerate(self.pieces)}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, header=text, propose=self.propose, protect=self.protect, **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read scores that `save` wrote. Raises PlanError where the file is not such a one."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
                header = json.loads(content["header"].tobytes())
                if header["fxprune_scores"] != FORMAT:
                    raise PlanError(
                        f"{path} has score format {header['fxprune_scores']}, this fxprune reads {FORMAT}: update it"
                    )
                sites = tuple(Site(name, content[f"site{i}"]) for i, name in enumerate(header["sites"]))
                pieces = tuple(content[f"piece{i}"] for i in range(header["pieces"]))
                groups = tuple((str(name), int(start), int(end)) for name, start, end in header["groups"])
                scores = content["propose"], content["protect"]
                rest = header["example"], _names(header["frozen"]), header["settings"], header["about"]
                sets = (tuple(map(tuple, header.get(name, ()))) for name in ("balanced", "larger"))
                return cls(*scores, groups, sites, pieces, *rest, *sets)
        except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            raise PlanError(
                f"{path} is not a score file that Scores.save wrote ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def random(
        cls,
        model: nn.Module,
        example: Any,
        *,
        seed: int = 0,
        exclude: Exclude = (),
        unknown: Unknown = "error",
    ) -> Scores:
        """Seeded random scores, for baselines and for tests that need no data."""
        graph = capture(model, example)
        coupling = analyse(graph, exclude=exclude, unknown=unknown)
        propose, protect = np.random.default_rng(seed).random((2, coupling.units))
        return scores_of(graph, coupling, propose, protect, {"random": seed})


def scores_of(
    graph: ModelGraph, coupling: Coupling, propose: Scalars, protect: Scalars, about: dict[str, Any]
) -> Scores:
    """Scores for the units of a coupling."""
    groups = tuple((group.name, group.units.start, group.units.stop) for group in coupling.prunable)
    example, settings = graph.meta["fxprune"]["example"], {"method": rung_of(graph)}
    frozen = coupling.frozen()
    facts = groups, coupling.sites, coupling.pieces, example, frozen, settings, about
    return Scores(propose, protect, *facts, coupling.balanced, coupling.larger)


def _names(frozen: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {str(reason): tuple(map(str, sites)) for reason, sites in frozen.items()}


def score(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    samples_per_class: int = 32,
    projections: int = 64,
    max_classes: int = 100,
    sample_memory: int = 1 << 30,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    unpack: Unpack | None = None,
    classes: Classes | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Scores:
    """Score every prunable unit of `model` in one pass over a small labelled calibration loader.

    The model runs in eval mode. The R-Score of a unit is |sum over samples of the first-order change of the loss when
    the unit goes|; its U-Score the largest class-to-class 1-Wasserstein distance of its activations, sliced over seeded
    directions for maps and sequences (arXiv 2508.02291). Both are taken where a unit is read, and summed where it is
    read in several places.

    Args:
        model: a trained model, or a graph from `capture`; it is not changed.
        loader: re-iterable; batches are (inputs, targets), ((in1, in2), targets), or dicts with a "labels", "label",
            "targets" or "target"; `unpack` turns any other batch into (inputs, targets).
        loss: callable(output, target) -> mean over the batch, a scalar; cross-entropy by default.
        samples_per_class: how many samples of each class the U-Score compares: the first ones of the loader.
        projections: directions of the sliced distance.
        max_classes: more classes than this are sampled, seeded.
        sample_memory: bytes that the stored samples may take; the number of projections is halved to stay below.
        exclude: module names, glob patterns of names, or module types whose outputs stay whole.
        unknown: "error", or "freeze" to keep what an operation without a rule touches.
        classes: callable(targets) -> (samples,) integers, where the targets are not class numbers themselves.
        seed: of the directions and of the sampled classes.
        device: where to run; the model's own device by default.
        progress: show a progress bar on a terminal.

    Raises:
        CalibrationError: the loader is empty or one-shot, a batch or its labels have an unknown form, there is one
            class only, or an activation, the loss or a gradient is not finite.
    """
    with undisturbed():
        graph = capture(model, _on(fitted_example(model, loader, unpack), device_of(model)))
        coupling = analyse(graph, exclude=exclude, unknown=unknown)
        sampler = Sampler(samples_per_class, max_classes, sample_memory, Draw(torch.empty(0), projections, seed))
        home, place = device_of(graph), torch.device(device) if device is not None else device_of(graph)
        try:
            gated, probes = _gated(graph, coupling, sampler.draw, place)
            with evaluating(gated):
                feed = _feed(gated, loader, unpack, place, progress=progress)
                totals = _totals(gated, probes, feed, loss or F.cross_entropy, sampler, classes)
        finally:
            graph.to(home)
        protect = _unit_sums(probes, totals, coupling.units)
        propose = _separabilities(probes, sampler, coupling.units)
    about = {
        "samples": sampler.seen, "classes": len(sampler.counts), "samples_per_class": samples_per_class,
        "projections": sampler.draw.projections, "seed": seed,
    }  # fmt: skip
    return scores_of(graph, coupling, propose, protect, about)


def _gated(
    graph: ModelGraph, coupling: Coupling, draw: Draw, place: torch.device
) -> tuple[fx.GraphModule, list[Probe]]:
    """The graph on the device `place`, with a probe on every edge."""
    graph.to(place)
    dtype = dtype_of(graph)
    gated, gates = insert(graph, coupling, lambda edge: Probe(edge, draw, place, dtype))
    return gated, [gate for gate in gates if isinstance(gate, Probe)]


@dataclass(slots=True)
class Sampler:
    """Chooses the samples that the U-Score compares: the first of each class, of at most `max_classes` classes."""

    per_class: int
    max_classes: int
    memory: int
    draw: Draw
    counts: dict[int, int] = field(default_factory=dict)
    labels: list[Tensor] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    seen: int = 0

    def choose(self, labels: Tensor, probes: list[Probe]) -> None:
        """Set the rows of the batch that the probes sample, and make room for their samples."""
        self._admit(set(labels.tolist()))
        rows = []
        for row, label in enumerate(labels.tolist()):
            if label in self.counts and self.counts[label] < self.per_class:
                self.counts[label] += 1
                rows.append(row)
        self.draw.rows = torch.tensor(rows, dtype=torch.int64)
        self.labels.append(labels[self.draw.rows])
        self.seen += len(labels)
        self.draw.batch += 1
        self.draw.make_room(probes)

    def _admit(self, present: set[int]) -> None:
        """Keep the `max_classes` classes that come first in a seeded order of all classes."""
        known = (set(self.counts) | present) - self.left_out
        admitted = set(heapq.nsmallest(self.max_classes, known, key=lambda label: _order(label, self.draw.seed)))
        self.left_out |= known - admitted
        self.counts = {label: self.counts.get(label, 0) for label in sorted(admitted)}

    def bound(self, probes: list[Probe]) -> None:
        """Halve the number of projections as often as the stored samples outgrow their memory."""
        while self.draw.projections > 1 and sum(s.nbytes for p in probes for s in p.samples) > self.memory:
            self.draw.projections //= 2
            for probe in probes:
                probe.samples = [s[..., : self.draw.projections].clone() for s in probe.samples]


def _order(label: int, seed: int) -> int:
    """A seeded random number for a class, the same in every process."""
    return int(np.random.SeedSequence([abs(label), int(label < 0), seed]).generate_state(1, np.uint64)[0])


def _feed(
    gated: fx.GraphModule, loader: Iterable[Any], unpack: Unpack | None, place: torch.device, *, progress: bool
) -> Iterator[tuple[Any, Any]]:
    """The inputs and targets of every batch, as the graph takes them, on the device, under a progress bar."""
    names = [str(node.target) for node in gated.graph.nodes if node.op == "placeholder"]
    length = len(loader) if isinstance(loader, Sized) else None
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        for inputs, targets in bar.track(batches(loader, unpack), total=length, description="scoring"):
            yield _on(fitted(inputs, names), place), _on(targets, place)


def _totals(
    gated: fx.GraphModule,
    probes: list[Probe],
    feed: Iterable[tuple[Any, Any]],
    loss: Loss,
    sampler: Sampler,
    classes: Classes | None,
) -> list[Tensor]:
    """The pass over the loader: sums the gradients of the gates, and leaves the samples in the probes."""
    totals = [torch.zeros(len(probe.units), dtype=torch.float64) for probe in probes]
    weights: list[Tensor] = [probe.weight for probe in probes]
    for index, (inputs, targets) in enumerate(feed):
        sampler.choose(class_of_samples(targets, sample_count(inputs), classes), probes)
        for total, grad in zip(totals, _gradients(gated, weights, inputs, targets, loss, index), strict=False):
            total.add_(grad)
        sampler.bound(probes)
    if len(sampler.counts) < 2 and weights:
        raise CalibrationError(
            f"all {sampler.seen} samples of the loader are of one class ({next(iter(sampler.counts))}); the U-Score "
            "compares classes: give samples of at least two"
        )
    return totals


def _gradients(
    gated: fx.GraphModule, weights: list[Tensor], inputs: Any, targets: Any, loss: Loss, index: int
) -> list[Tensor]:
    """The gradients of a batch's summed loss by the gates, in float64 on the CPU; nothing else of the batch stays."""
    value = _loss_of(gated, inputs, targets, loss, index)
    if not weights or not value.requires_grad:
        return []
    grads = torch.autograd.grad(value * sample_count(inputs), weights, materialize_grads=True)
    return [grad.double().cpu() for grad in grads]


def _unit_sums(probes: list[Probe], totals: list[Tensor], units: int) -> Scalars:
    """|sum over all positions of a unit, on all edges, of the gates' gradients|."""
    sums = np.zeros(units + 1)
    for probe, total in zip(probes, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                f"a gradient on the edge {probe.reads} is not finite: look for overflow in the model or the loss"
            )
        np.add.at(sums, probe.units, total.numpy())
    return np.abs(sums[:-1])


def _separabilities(probes: list[Probe], sampler: Sampler, units: int) -> Scalars:
    """The U-Score of each unit, summed over the edges that read it."""
    result = np.zeros(units)
    labels = torch.cat([torch.empty(0, dtype=torch.int64), *sampler.labels])
    chosen = torch.isin(labels, torch.tensor(sorted(sampler.counts), dtype=torch.int64))
    for probe in probes:
        if not probe.samples:  # it reads through a weight, and sees no activations
            continue
        width = min(sampler.draw.projections, max(s.shape[-1] for s in probe.samples))
        parts = [s[..., :width].expand(*s.shape[:2], width) for s in probe.samples]  # single positions project on one
        samples = torch.cat(parts)[chosen]
        found = separability(samples, labels[chosen]).double().numpy()
        if not np.isfinite(found).all():
            raise CalibrationError(
                f"an activation on the edge {probe.reads} is not finite: look for overflow in the model"
            )
        result[probe.own] += found
        probe.samples.clear()
    return result


def _loss_of(gated: fx.GraphModule, inputs: Any, targets: Any, loss: Loss, index: int) -> Tensor:
    """The loss of one batch. Raises CalibrationError where it is not one finite number."""
    try:
        output = gated(*placeholder_values(gated, inputs))
    except Exception as error:
        raise CalibrationError(
            f"the model fails on batch {index} ({type(error).__name__}: {first_line(error)})"
        ) from error
    try:
        value: Any = loss(output, targets)
    except Exception as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise CalibrationError(
            f"the loss {name} fails on batch {index} ({type(error).__name__}: {error}): "
            "pass loss=, a callable(output, target) that fits the model's output"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise CalibrationError(f"the loss of batch {index} has {what}: it must be one number, the mean over the batch")
    if not bool(torch.isfinite(value.detach())):
        raise CalibrationError(
            f"the loss of batch {index} is {float(value.detach())}{_first_not_finite(gated, inputs)}"
        )
    return value


def _first_not_finite(gated: fx.GraphModule, inputs: Any) -> str:
    """Which value of the batch is the first that is not finite, in words."""
    search = _Search(gated)
    with torch.no_grad():
        search.run(*placeholder_values(gated, inputs))
    if search.found is None:
        return ": the output is finite, look at the loss and the targets"
    what = "the input" if search.found.op == "placeholder" else "the output of"
    return f": {what} {search.found.target} holds NaN or infinity"


class _Search(fx.Interpreter):
    """Runs a graph and remembers the first node whose value is not finite."""

    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        floats = (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point())
        if self.found is None and not all(bool(torch.isfinite(t).all()) for t in floats):
            self.found = n
        return value


def _on(values: Any, device: torch.device) -> Any:
    """Every tensor in `values`, on `device`."""
    return pytree.tree_map_only(Tensor, lambda t: (t.clone() if t.is_inference() else t).to(device), values)
