"""Scores: one number of each kind for every prunable unit, and the plans that follow from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from fxprune.caller.arguments import CHECKS, check, instance
from fxprune.caller.arrays import BROKEN, Index, Scalars, read, write
from fxprune.caller.example import to_json
from fxprune.caller.files import regular
from fxprune.caller.isolation import undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.typed_json import restored
from fxprune.coupling.collector import Exclude
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling, Key, Site
from fxprune.coupling.interpreter import Unknown
from fxprune.errors import FxpruneWarning, PlanError
from fxprune.planning.allocation import EVEN, Allocate, Allocation, levels
from fxprune.planning.budgets import Cost, given, meet, remedies
from fxprune.planning.costs import Costs, costs_of
from fxprune.planning.latency import Latency
from fxprune.planning.plan import Budget, Plan, coupling_of, plan_of
from fxprune.scoring.moments import Moments
from fxprune.scoring.node_times import measure
from fxprune.scoring.score_file import check_consistent
from fxprune.tracing.capture import capture_around, captured
from fxprune.tracing.graph import ModelGraph, example_of
from fxprune.tracing.part import part_of
from fxprune.tracing.settings import settings_of

FORMAT = 3


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of every prunable unit, and all that a plan needs.

    `propose` and `protect` hold one number a unit: the lowest go first, the highest are protected. `groups` are (name,
    first unit, end) of the groups, `sites` the layers with the unit of each channel, `pieces` sets of units of which
    one at least has to stay. `frozen` says why some layers stay whole, `settings` how the model was captured and
    coupled, and `about` how the scores were made. `balanced` are sets of sites that keep the same number of channels
    each, and `larger` pairs of which the first keeps more than the second. `costs` says what the model costs under any
    plan, and `times`, from `with_latency`, how long it takes. `moments` are those of what every edge reads, and
    `channels` the number of channels that go with each unit.
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
    costs: Costs | None = None
    times: Latency | None = None
    moments: Mapping[Key, Moments] = field(default_factory=dict)
    channels: Index | None = None
    min_keep: int = 1
    round_to: int = 1

    def plan(
        self,
        alpha: float | None = None,
        *,
        params: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        allocate: str | Allocate = "tod",
        min_keep: int | None = None,
        round_to: int | None = None,
    ) -> Plan:
        """The plan at level alpha, or at the lowest level that keeps to a budget.

        Every unit goes whose level, by the allocation, is at most alpha. A budget is met from below, within 1 % of it
        where single units are that small: units come back to a level that lies further below.

        Args:
            alpha: the level, 0 <= alpha <= 1, shared by all groups; of "tod", the tolerance of difference. 0.05 where
                nothing else is given either.
            params: the share of the parameters to keep, 0 < params <= 1; exact.
            macs: the share of the multiply-accumulates to keep; exact.
            latency: the share of the time to keep, as estimated from the times that `with_latency` took.
            allocate: "tod" (every group loses those proposed first, to the largest depth at which the share of them
                that the whole network protects, weighed by what they cost a channel, is at most alpha), "tod-by-group"
                (protection is a matter of the group alone, as published), "uniform" (the same share of every group),
                "global" (one ranking of all units), or a function (propose, protect, groups) -> the lowest level at
                which each unit goes, inf where it never does.
            min_keep: the fewest units that a group keeps; by default what `score` was told, or 1.
            round_to: the number of units that a group keeps is rounded up to a multiple of this; by default as well.

        Raises:
            PlanError: several of alpha and the budgets are given, or the budget is below all that can be reached.
        """
        check(Scores.plan, locals())
        what, value = given(alpha=alpha, params=params, macs=macs, latency=latency) or ("alpha", 0.05)
        allocation = self.allocation(allocate, min_keep=min_keep, round_to=round_to, per=what)
        if what == "alpha":
            plan = plan_of(self.sites, allocation.keep(value + EVEN), self.example, value, self.frozen, self.settings)
        else:
            found = meet(allocation, self._cost(what), value, what, remedies(allocate, allocation, self.settings))
            budget = Budget(what, value, found.achieved)
            plan = plan_of(self.sites, found.keep, self.example, found.level, self.frozen, self.settings, budget)
        return replace(plan, allocate=allocate if isinstance(allocate, str) else None)

    def with_latency(self, model: nn.Module, example: Any = None, *, repeats: int = 20) -> Scores:
        """These scores, with a table of the times of the model's nodes for `plan(latency=...)`.

        Every node is timed at five widths on the device where the model is. The estimate adds the nodes up, on straight
        lines between their widths, and a rest so that it is right for the whole model.

        Args:
            model: the model that the scores are of.
            example: the batch to run, as the model (or its part) takes it; the two samples of scoring by default.
            repeats: runs of which the median is taken.
        """
        check(Scores.with_latency, locals())
        need_numbers(model, "with_latency")
        part = part_of(model, str(self.settings.get("submodule", "")))
        with undisturbed():
            graph = captured(self.settings, part, self.example)
            coupling = coupling_of(graph, self.plan(0))
        if [(s.name, s.units.tolist()) for s in coupling.sites] != [(s.name, s.units.tolist()) for s in self.sites]:
            raise PlanError(
                f"the scores are not of {type(model).__name__}: score it, or give the model that was scored"
            )
        return replace(self, times=measure(graph, coupling, self.allocation("uniform"), example, repeats=repeats))

    def allocation(
        self,
        allocate: str | Allocate = "tod",
        *,
        min_keep: int | None = None,
        round_to: int | None = None,
        per: str = "macs",
    ) -> Allocation:
        """The level at which each unit goes, and what has to hold at every level; arguments as of `plan`.

        `per` is what protection is weighed by: "params" or, for all else, MACs.
        """
        check(Scores.allocation, locals())
        min_keep = self.min_keep if min_keep is None else min_keep
        round_to = self.round_to if round_to is None else round_to
        level = levels(allocate, self.propose, self.protect, self.groups, self.worth(allocate, per=per))
        units = {site.name: site.units for site in self.sites}
        equal, larger = (
            tuple(tuple(units[n] for n in names) for names in sets) for sets in (self.balanced, self.larger)
        )
        return Allocation(level, self.propose, self.groups, self.pieces, equal, larger, min_keep, round_to)

    def worth(self, allocate: str | Allocate | None = "tod", *, per: str = "macs") -> Scalars | None:
        """What the model costs less without each unit, by its channels; None where an allocation does not ask."""
        if self.costs is None or self.channels is None or allocate != "tod":
            return None
        costs = (self.costs.unit_params if per == "params" else self.costs.unit_macs)(len(self.propose))
        return costs / np.maximum(self.channels, 1)  # a unit of many layers saves more, and is read by more

    def _cost(self, what: str) -> Cost:
        """What a budget of one kind is a share of, as a function of the units that stay."""
        if what == "latency":
            if self.times is None:
                raise PlanError("latency is given, but no times were taken: scores = scores.with_latency(model) first")
            return self.times.estimate
        if self.costs is None:
            raise PlanError(f"{what} is given, but these scores do not know what the model costs: score it again")
        if what == "macs" and self.costs.inexact:
            names = ", ".join(self.costs.inexact)
            warnings.warn(f"the MACs of {names} count as if no plan changed them", FxpruneWarning, stacklevel=3)
        return self.costs.parameters if what == "params" else self.costs.macs

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores as a compressed .npz of plain arrays, whole or not at all; nothing in it is pickled."""
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
            "costs": self.costs and {"samples": self.costs.samples, "inexact": self.costs.inexact},
            "times": self.times and {"rest": self.times.rest, "device": self.times.device},
            "moments": list(self.moments),
            "min_keep": self.min_keep,
            "round_to": self.round_to,
        }
        arrays: dict[str, Any] = {f"site{i}": site.units for i, site in enumerate(self.sites)}
        arrays |= {f"piece{i}": units for i, units in enumerate(self.pieces)}
        arrays |= {} if self.channels is None else {"channels": self.channels}
        arrays |= _named("costs", self.costs.arrays() if self.costs else {})
        arrays |= _named("times", self.times.arrays() if self.times else {})
        for index, moments in enumerate(self.moments.values()):
            arrays |= _named(f"moments{index}", moments.arrays())
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        write(path, {"header": text, "propose": self.propose, "protect": self.protect, **arrays}, PlanError)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read scores that `save` wrote. Raises PlanError where the file is not such a one."""
        file = regular(path, PlanError, "read")
        try:
            content = read(file)
            header = json.loads(content["header"].tobytes())
            if header["fxprune_scores"] != FORMAT:
                raise PlanError(
                    f"{path} has score format {str(header['fxprune_scores'])[:20]}, this fxprune reads {FORMAT}: "
                    "update it"
                )
            scores = cls._restored(header, content)
            check_consistent(scores)
            return scores
        except OSError as error:
            raise PlanError(f"{path} cannot be read ({error})") from error
        except BROKEN as error:
            raise PlanError(
                f"{path} is not a score file that Scores.save wrote ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _restored(cls, header: Mapping[str, Any], content: Mapping[str, Any]) -> Scores:
        """The scores of a file's header and arrays."""
        sites = tuple(Site(str(name), content[f"site{i}"]) for i, name in enumerate(header["sites"]))
        pieces = tuple(content[f"piece{i}"] for i in range(header["pieces"]))
        groups = tuple((str(name), int(start), int(end)) for name, start, end in header["groups"])
        rest = header["example"], _names(header["frozen"]), header["settings"], header["about"]
        balanced, larger = (tuple(tuple(map(str, names)) for names in header[name]) for name in ("balanced", "larger"))
        costs = header["costs"] and Costs.of_arrays(
            _part(content, "costs"), int(header["costs"]["samples"]),
            restored(tuple[str, ...], header["costs"]["inexact"], "costs.inexact"),
        )  # fmt: skip
        times = header["times"] and Latency.of_arrays(
            _part(content, "times"), float(header["times"]["rest"]), str(header["times"]["device"])
        )
        moments = {
            (str(source), str(how)): Moments.of_arrays(_part(content, f"moments{index}"))
            for index, (source, how) in enumerate(header["moments"])
        }
        channels, limits = content.get("channels"), (int(header["min_keep"]), int(header["round_to"]))
        return cls(
            content["propose"], content["protect"], groups, sites, pieces, *rest, balanced, larger, costs, times,
            moments, channels, *limits,
        )  # fmt: skip

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
        submodule: str = "",
    ) -> Scores:
        """Seeded random scores, for baselines, for tests that need no data, and for models without numbers.

        `example` is what the part takes.
        """
        check(cls.random, locals())
        graph = capture_around(exclude, part_of(model, submodule), example)
        options = {"inexact": inexact, "head_dim": head_dim}
        with undisturbed():
            coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
            drawn = np.random.default_rng(seed).random((2, coupling.units))
            own = options | {"submodule": submodule}
            return scores_of(graph, coupling, (drawn[0], drawn[1]), own, {"random": int(seed)})


CHECKS["scores"] = instance(Scores, "give what fxprune.score or Scores.load gave", PlanError)


def scores_of(
    graph: ModelGraph,
    coupling: Coupling,
    scores: tuple[Scalars, Scalars],
    options: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Scores:
    """Scores (those that propose, those that protect) for the units of a coupling that was made with some options."""
    groups = tuple((group.name, group.units.start, group.units.stop) for group in coupling.prunable)
    settings = settings_of(graph) | {name: value for name, value in options.items() if value}
    example, frozen = to_json(example_of(graph)), coupling.frozen()
    return Scores(
        *scores, groups, coupling.sites, coupling.pieces, example, frozen, settings, about, coupling.balanced,
        coupling.larger, costs_of(graph, coupling), channels=_channels(coupling),
    )  # fmt: skip


def _channels(coupling: Coupling) -> Index:
    """The number of channels that go with each unit."""
    counts = np.zeros(coupling.units + 1, dtype=np.int64)
    for site in coupling.sites:
        np.add.at(counts, np.where(site.units < coupling.units, site.units, -1), 1)
    return counts[:-1]


def _named(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": array for name, array in arrays.items()}


def _part(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays that `_named` gave their names."""
    return {name.removeprefix(f"{prefix}_"): content[name] for name in content if name.startswith(f"{prefix}_")}


def _names(frozen: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {str(reason): tuple(map(str, sites)) for reason, sites in frozen.items()}
