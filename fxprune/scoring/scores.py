"""Scores: one number of each kind for every prunable unit, and the plans that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.caller.arguments import CHECKS, check, instance
from fxprune.caller.arrays import Index, Scalars
from fxprune.caller.batches import Unpack
from fxprune.caller.computed_weights import parametrized
from fxprune.caller.isolation import full_float32, on_device, seeded, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.source_lines import warn
from fxprune.coupling.branch_units import SITE
from fxprune.coupling.collector import Exclude
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.coupling.interpreter import Unknown
from fxprune.coupling.kinds import BRANCHES, repeated
from fxprune.errors import PlanError, plural, stage, visible
from fxprune.planning.allocation import (
    BESIDE,
    EVEN,
    MEASURED,
    ONLY,
    Allocate,
    Allocation,
    RoundTo,
    blocks_of,
    jointly,
    levels,
)
from fxprune.planning.budgets import DEFAULT_ALPHA, NOTHING, Cost, given, meet, remedies
from fxprune.planning.costs import costs_of
from fxprune.planning.curves import bundles, measured_levels
from fxprune.planning.plan import Budget, Plan, coupling_of
from fxprune.planning.ratios import Ratios, check_used, fixed
from fxprune.scoring.calibration import calibration_of
from fxprune.scoring.curves import measured_curves
from fxprune.scoring.divergence import Divergence, Metric, logits_of
from fxprune.scoring.node_times import measure
from fxprune.scoring.score_file import ScoreData, read_scores, write_scores
from fxprune.scoring.signals.table import activations, magnitudes
from fxprune.tracing.capture import capture_around, captured
from fxprune.tracing.graph import ModelGraph, captured_of
from fxprune.tracing.part import Run, part_of
from fxprune.tracing.settings import settings_of


@dataclass(frozen=True, slots=True, eq=False)
class Scores(ScoreData):
    """The scores of every prunable unit, and all that a plan needs.

    `propose` and `protect` hold one number for each unit: the lowest are removed first, the highest are protected.
    `groups` are (name, first unit, end) of the groups, `sites` the layers with the unit of each channel, `pieces` sets
    of units of which at least one is kept. `frozen` gives the reasons why layers are kept whole, `settings` how the
    model was captured and coupled, and `about` how the scores were made. `balanced` are sets of sites that keep the
    same number of channels, and `larger` pairs of which the first keeps more than the second; `even` are sets of axes,
    each given by the unit of every index, that keep the same number of indices, and `floors` are sets of units, each
    with the least number that is kept. `kinds` are those of the groups' units, and `repeats` sets of the numbers of
    groups that blocks repeat, which keep equal numbers with `equal_blocks`. `counts` are, for each group, the numbers
    of units that it can keep, empty for all. `costs` are the model's under any plan, and
    `times`, from `with_latency`, its latency. `moments` are those of every edge's activations, and `channels` the
    number of channels that are removed with each unit. `curves` and `magnitudes` are from `with_curves`.
    `blocks` says whether residual branches, whose units are the last, are removed "beside" others, or "only" they.
    """

    def __str__(self) -> str:
        about, whole = self.about, sum(map(len, self.frozen.values()))
        units = f"{plural(len(self.propose), 'unit')} in {plural(len(self.groups), 'group')}"
        lines = [f"scores of {about.get('model', 'a model')}: {units}; {plural(whole, 'layer')} kept whole"]
        if "samples" in about:
            samples = plural(int(about["samples"]), "sample")
            lines.append(f"  {about['propose']} proposes and {about['protect']} protects, on {samples}")
        if "loss" in about:
            right = f", right on {about['accuracy']:.1%}" if "accuracy" in about else ""
            lines.append(f"  the original there: loss {about['loss']:.3g}{right}")
        return visible("\n".join([*lines, f"  {self.times}"] if self.times else lines))

    __repr__ = __str__

    def plan(
        self,
        alpha: float | None = None,
        *,
        params: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        allocate: str | Allocate | None = None,
        min_keep: int | None = None,
        round_to: RoundTo | None = None,
        equal_blocks: bool | None = None,
        ratios: Ratios | None = None,
        blocks: bool | str | None = None,
    ) -> Plan:
        """The plan at level alpha, or at the lowest level that keeps to a budget.

        Units are removed whose level, by the allocation, is at most alpha. A budget is met from below, within 1 % of it
        where single units are that small: if the next level is further below, some of its units are kept again.

        Args:
            alpha: the level, 0 <= alpha <= 1, shared by all groups; for "tod" the tolerance of difference. 0.05 where
                neither a budget nor ratios are given.
            params: the share of the parameters to keep, 0 < params <= 1; exact.
            macs: the share of the multiply-accumulates to keep; exact.
            latency: the share of the time to keep, as estimated from the times that `with_latency` took.
            allocate: by default "measured" for a budget on scores that have curves, and "tod" otherwise. "measured"
                (the units removed next are those that move the outputs least per cost that they save, by the curves of
                `with_curves`), "tod" (every group loses the units proposed first, to the largest depth at which the
                protected share of them is at most alpha; units are protected over the whole network, by `protect` per
                cost of a channel), "tod-by-group" (protected within the group, as published), "uniform" (the same share
                of every group), "global" (one ranking of all units), or a function (propose, protect, groups) -> the
                lowest level at which each unit is removed, inf for never.
            min_keep: the fewest units that a group keeps; by default as given to `score`, or 1.
            round_to: the number of kept units of a group is rounded up to a multiple of this; by default likewise. A
                dict has multiples for kinds of units, and 1 for all others: {"heads": 1, "hidden": 128}. The kinds are
                "heads", "head_dim" (places in heads), "hidden", "experts" and "expert_units" (their hidden units).
            equal_blocks: let blocks that repeat, such as the layers of a transformer, keep equal numbers of units of
                each kind, each block its own best ones. The units of one rank are then removed at one level; by default
                likewise.
            ratios: by the name of a layer, or a glob pattern of names, the share of its units to remove, at least 0 and
                less than 1: {"layer1.0.conv1": 0.5, "layer2.*": 0.25}. The units proposed first are removed, and with
                them the channels of coupled layers. A name counts more than a pattern. All other groups lose what the
                level or the budget says, and nothing where neither is given.
            blocks: whether residual branches are removed whole beside units of layers, by their measured curve, or
                "only" they; by default as given to `score`.

        Raises:
            PlanError: several of alpha and the budgets are given, the budget is below all that can be reached, or
                `ratios` names no layer that can lose channels or gives coupled layers different ratios; the scores
                lack what `blocks` asks for.
        """
        check(Scores.plan, locals())
        asked = given(alpha=alpha, params=params, macs=macs, latency=latency)
        kind, value = asked or ("alpha", NOTHING if ratios else DEFAULT_ALPHA)
        if allocate is None:
            allocate = "tod" if kind == "alpha" or self.curves is None else MEASURED
        allocation = self.allocation(
            allocate, min_keep=min_keep, round_to=round_to, equal_blocks=equal_blocks, per=kind, blocks=blocks
        )
        if ratios:
            allocation = replace(allocation, level=self._with_ratios(allocation, ratios))
        if kind == "alpha" and not ratios and self._blocks(blocks) == ONLY:
            raise PlanError('blocks="only" removes branches within a budget: give params=, macs= or latency=')
        level = value if asked or not ratios else None
        if kind == "alpha":
            kept, budget = allocation.keep(value + EVEN), None
        else:
            by_blocks, cost = self._blocks(blocks), self._cost(kind)
            frozen = [(own, why) for why, sites in self.frozen.items() if (own := _of_kind(sites, by_blocks))]
            even = replace(allocation, level=self._levels("uniform", allocation.propose, kind, by_blocks))
            most = self._with_ratios(even, ratios) if ratios else even.level
            mends = remedies(allocation, cost, value, most, frozen)
            found = meet(allocation, cost, value, kind, chain(mends, ["give larger ratios="] * bool(ratios)), frozen)
            kept, level, budget = found.keep, found.level, Budget(kind, value, found.achieved)
        padded, name = np.append(kept, True), allocate if isinstance(allocate, str) and not ratios else None
        keep = {site.name: tuple(np.flatnonzero(padded[site.units]).tolist()) for site in self.sites}
        widths = {site.name: site.width for site in self.sites}
        return Plan(keep, widths, self.example, level, self.frozen, self.settings, budget, name)

    def candidates(self, **asked: Any) -> dict[str, tuple[Scores, Plan]]:
        """Name -> a plan for a budget, made in that way, and the scores that it was made from.

        By "measured", "tod", "uniform" and "global", and, where "reconstruction" proposes, by "tod" with "magnitude"
        instead. Where branches may be removed beside units of layers, "measured" is tried with both, and with either
        alone. `asked` is as for `plan`. Ways that cannot keep to the budget are left out.

        Raises:
            PlanError: no way can.
        """
        ways = {allocate: (self, allocate) for allocate in (MEASURED, "tod", "uniform", "global")}
        if self.blocks == BESIDE and BRANCHES in self.kinds:
            ways |= {
                f"{MEASURED}, blocks={how!r}": (replace(self, blocks=blocks_of(how)), MEASURED) for how in (False, ONLY)
            }
        if self.magnitudes is not None and self.about.get("propose") == "reconstruction":
            by_size = replace(self, propose=self.magnitudes, about={**self.about, "propose": "magnitude"})
            ways["tod, propose=magnitude"] = by_size, "tod"
        found, errors = dict[str, tuple[Scores, Plan]](), list[PlanError]()
        for name, (scores, allocate) in ways.items():
            try:
                found[name] = scores, scores.plan(**asked, allocate=allocate)
            except PlanError as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return found

    def with_latency(self, model: nn.Module, example: Any = None, *, repeats: int = 20) -> Scores:
        """These scores, with a table of the times of the model's nodes for `plan(latency=...)`.

        Every node is timed at five widths on the model's device. The estimate sums the nodes, interpolated linearly
        between the widths, and a constant that makes it right for the whole model.

        Args:
            model: the scored model.
            example: the batch to run, as the model (or its part) takes it; the two samples of scoring by default.
            repeats: number of runs; their median counts.
        """
        check(Scores.with_latency, locals())
        need_numbers(model, "with_latency")
        part = part_of(model, str(self.settings.get("submodule", "")))
        graph, coupling = self._coupled(model, part)
        return replace(self, times=measure(graph, coupling, self.allocation("uniform"), example, repeats=repeats))

    def with_curves(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        loss: Callable[..., Any] | None = None,
        unpack: Unpack | None = None,
        run: Run | None = None,
        metric: Metric | None = None,
        max_samples: int | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> Scores:
        """These scores, with a curve for each group for `plan(allocate="measured")`.

        Each group alone is pruned to up to nine depths; layers that read removed units read a prediction from the kept
        ones instead. A curve holds the divergence of the outputs on a few held-out samples from the original's: the
        Kullback-Leibler divergence for logits and distributions, the squared error as a share of the variance for
        others. Only nodes behind the group run again. Residual branches have one curve for all: the next to
        be removed is the one that, beside those before it, moves the outputs least for what it saves.

        Args:
            model: the scored model.
            loader, loss, unpack, run, max_samples, device, seed: as given to `score`.
            metric: see `compress`.
        """
        check(Scores.with_curves, locals())
        need_numbers(model, "with_curves")
        submodule = str(self.settings.get("submodule", ""))
        part = part_of(model, submodule)
        with stage("measuring curves"), seeded(seed), full_float32():
            graph, coupling = self._coupled(model, part)
            with on_device(device, graph):
                data = calibration_of(
                    model, graph, loader, submodule=submodule, unpack=unpack, run=run, max_samples=max_samples
                )
                if not data.judges or not coupling.units:
                    return self
                logits = () if submodule else logits_of(graph, data, by_class=loss is None and not run)
                within = self.allocation("uniform")
                sizes = magnitudes(graph, coupling)
                curves = measured_curves(
                    graph, coupling, self.moments, within,
                    (self.propose, self.protect, sizes, activations(coupling, self.moments)), data,
                    Divergence(logits, metric), alone=self.blocks == ONLY, saved=self._saved(),
                )  # fmt: skip
                return replace(self, curves=curves, magnitudes=sizes)

    def _saved(self) -> Scalars:
        """What each unit saves, as the sum of its shares of the parameters and of the MACs."""
        if self.costs is None:
            return np.ones(len(self.propose))
        count, keep = len(self.propose), np.ones(len(self.propose), dtype=bool)
        params = self.costs.unit_params(count) / max(self.costs.parameters(keep), 1)
        macs = self.costs.unit_macs(count) / max(self.costs.macs(keep), 1)
        return params + macs

    def _coupled(self, model: nn.Module, part: nn.Module) -> tuple[ModelGraph, Coupling]:
        """The graph of the scored part and its coupling. Raises PlanError where the scores are not of it."""
        with undisturbed():
            graph = captured(self.settings, part, self.example)
            coupling = coupling_of(graph, self.plan(0, blocks=False))
        if [(s.name, s.units.tolist()) for s in coupling.sites] != [(s.name, s.units.tolist()) for s in self.sites]:
            raise PlanError(
                f"the scores are not of {type(model).__name__}: score it, or give the model that was scored"
            )
        return graph, coupling

    def allocation(
        self,
        allocate: str | Allocate = "tod",
        *,
        min_keep: int | None = None,
        round_to: RoundTo | None = None,
        equal_blocks: bool | None = None,
        per: str = "macs",
        blocks: bool | str | None = None,
    ) -> Allocation:
        """The level at which each unit is removed, and the constraints at every level; arguments as of `plan`.

        `per` is the cost that weights protection: "params", or MACs for anything else.
        """
        check(Scores.allocation, locals())
        min_keep = self.min_keep if min_keep is None else min_keep
        round_to = self.round_to if round_to is None else round_to
        equal_blocks = self.equal_blocks if equal_blocks is None else equal_blocks
        curves = self.curves if allocate == MEASURED else None
        if allocate == MEASURED and curves is None:
            raise PlanError(
                'allocate="measured" needs curves, and these scores have none: '
                "scores = scores.with_curves(model, loader) first"
            )
        if curves is not None and equal_blocks != self.equal_blocks:
            raise PlanError(
                f"the curves of these scores were measured with equal_blocks={self.equal_blocks}, and the plan is "
                f"asked for with equal_blocks={equal_blocks}: score with that, too, or pass another allocate="
            )
        by_blocks = self._blocks(blocks)
        propose, by = (self.propose, allocate) if curves is None else (curves.late(), "uniform")
        level = self._levels(by, propose, per, by_blocks)
        units = {site.name: site.units for site in self.sites}
        equal, larger = (
            tuple(tuple(units[n] for n in names) for names in sets) for sets in (self.balanced, self.larger)
        )
        equal += tuple(tuple(map(np.array, axes)) for axes in self.even)
        if equal_blocks:
            level = jointly(level, propose, self.groups, self.repeats)
            units_of = [np.arange(start, end) for _, start, end in self.groups]
            equal += tuple(tuple(units_of[number] for number in numbers) for numbers in self.repeats)
        found = Allocation(
            level, propose, self.groups, self.pieces, equal, larger, self.floors, min_keep, round_to, self.kinds,
            self.counts,
        )  # fmt: skip
        if curves is None:
            return found
        cost, parts = self._cost("macs" if per == "alpha" else per), bundles(found)
        branches = [int(part[0]) >= self.layer_units for part in parts]
        curves = curves.only([by_blocks != "" if own else by_blocks != ONLY for own in branches])
        return replace(found, level=measured_levels(curves, parts, lambda keep: cost(found.settled(keep))))

    @property
    def layer_units(self) -> int:
        """The number of units that are no branches, which come last."""
        return self.groups[-1][1] if BRANCHES in self.kinds else len(self.propose)

    def _blocks(self, asked: bool | str | None) -> str:  # noqa: FBT001 - the argument itself
        """How branches are removed by the argument `blocks`. Raises PlanError where the scores do not tell."""
        blocks = self.blocks if asked is None else blocks_of(asked)
        if blocks not in ("", self.blocks) and (not self.blocks or blocks == BESIDE):
            made = "without blocks" if not self.blocks else 'with blocks="only"'
            raise PlanError(
                f"the plan is asked for with blocks={asked!r}, and the scores were made {made}: score with it"
            )
        return blocks

    def _levels(self, allocate: str | Allocate, propose: Scalars, per: str, blocks: str) -> Scalars:
        """The levels of the units by an allocation that does not look at curves: it keeps all branches."""
        count, found = self.layer_units, np.full(len(propose), np.inf)
        if blocks != ONLY:
            worth, groups = self.worth(allocate, per=per), tuple(g for g in self.groups if g[1] < count)
            of_layers = None if worth is None else worth[:count]
            found[:count] = levels(allocate, propose[:count], self.protect[:count], groups, of_layers)
        return found

    def _with_ratios(self, allocation: Allocation, ratios: Ratios) -> Scalars:
        """The levels of an allocation, with the groups of some layers decided by ratios."""
        layers = [
            [site.name for site in self.sites if ((site.units >= start) & (site.units < end)).any()]
            for _, start, end in self.groups
        ]
        check_used(ratios, [name for names in layers for name in names], self.frozen)
        return fixed(allocation.level, allocation.propose, self.groups, layers, ratios)

    def worth(self, allocate: str | Allocate | None = "tod", *, per: str = "macs") -> Scalars | None:
        """What the model saves without each unit, divided by its channels; None for allocations that do not use it."""
        if self.costs is None or self.channels is None or allocate != "tod":
            return None
        costs = (self.costs.unit_params if per == "params" else self.costs.unit_macs)(len(self.propose))
        return costs / np.maximum(self.channels, 1)  # a unit of many layers saves more, and has more readers

    def _cost(self, kind: str) -> Cost:
        """The cost that a budget limits, as a function of the kept units."""
        if kind == "latency":
            if self.times is None:
                raise PlanError("latency is given, but no times were taken: scores = scores.with_latency(model) first")
            return self.times.estimate
        if self.costs is None:
            raise PlanError(f"{kind} is given, but these scores hold no costs of the model: score it again")
        if kind == "macs" and self.costs.inexact:
            names = ", ".join(self.costs.inexact)
            warn(f"the MACs of {names} count as if no plan changed them")
        return self.costs.parameters if kind == "params" else self.costs.macs

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores as a compressed .npz of plain arrays, whole or not at all; nothing in it is pickled."""
        write_scores(path, self)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read scores that `save` wrote. Raises PlanError where the file is not one of these."""
        return cls(**read_scores(path))

    @classmethod
    def random(
        cls,
        model: nn.Module,
        example: Any,
        *,
        seed: int = 0,
        exclude: Exclude = (),
        unknown: Unknown = "error",
        inexact: bool = False,
        head_dim: bool = False,
        query_heads: bool = False,
        submodule: str = "",
    ) -> Scores:
        """Seeded random scores, for baselines, for tests that need no data, and for models without numbers.

        `example` is what the part takes.
        """
        check(cls.random, locals())
        graph = capture_around(exclude, part_of(model, submodule), example)
        options: dict[str, Any] = {"inexact": inexact, "head_dim": head_dim, "query_heads": query_heads}
        with undisturbed():
            coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
            drawn = np.random.default_rng(seed).random((2, coupling.units))
            own = options | {"submodule": submodule}
            return scores_of(graph, coupling, (drawn[0], drawn[1]), own, {"random": int(seed)})


CHECKS["scores"] = instance(Scores, "give what fxprune.score or Scores.load gave", PlanError)


def scores_of(
    graph: ModelGraph, coupling: Coupling, scores: tuple[Scalars, Scalars], options: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Scores:  # fmt: skip
    """Scores (those that propose, those that protect) of the units of a coupling that was made with some options."""
    groups = tuple((group.name, group.units.start, group.units.stop) for group in coupling.prunable)
    settings = settings_of(graph) | {name: value for name, value in options.items() if value}
    about = {"model": type(graph).__name__} | dict(about)
    example = captured_of(graph).description
    frozen = coupling.frozen() | parametrized(graph, str(options.get("submodule", "")))
    limits = captured_of(graph).limits
    counts = (
        [limits.counts[site.name] for site in group.sites if site.name in limits.counts] for group in coupling.prunable
    )
    return Scores(
        *scores, groups, coupling.sites, coupling.pieces, example, frozen, settings, about, coupling.balanced,
        coupling.larger, coupling.even, costs_of(graph, coupling), channels=_channels(coupling),
        floors=coupling.floors, kinds=tuple(group.kind for group in coupling.prunable),
        repeats=repeated(coupling, dict(graph.named_modules(remove_duplicate=False)), limits.repeats),
        counts=tuple(own[0] if own else () for own in counts) if limits.counts else (),
    )  # fmt: skip


def _of_kind(sites: Sequence[str], blocks: str) -> Sequence[str]:
    """Those sites that can be removed by `blocks`: branches alone where it is `ONLY`."""
    return sites if blocks != ONLY else [name for name in sites if name.startswith(SITE)]


def _channels(coupling: Coupling) -> Index:
    """The number of channels that are removed with each unit."""
    counts = np.zeros(coupling.units + 1, dtype=np.int64)
    for site in coupling.sites:
        np.add.at(counts, np.where(site.units < coupling.units, site.units, -1), 1)
    return counts[:-1]
