"""Scores: one number of each kind for every prunable unit, and the plans that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fxprune.allocate import Allocate, Allocation, levels
from fxprune.capture import ModelGraph, capture_around, settings_of
from fxprune.coupling import Coupling, Exclude, Index, Site, analyse
from fxprune.errors import PlanError
from fxprune.plan import Plan, plan_of
from fxprune.submodule import part_of
from fxprune.walk import Unknown

FORMAT = 1
Scalars = NDArray[np.float64]


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

    def plan(
        self, alpha: float = 0.05, *, allocate: str | Allocate = "tod", min_keep: int = 1, round_to: int = 1
    ) -> Plan:
        """The plan at level alpha: every unit goes whose level, by the allocation, is at most alpha.

        Args:
            alpha: the level, 0 <= alpha <= 1, shared by all groups; of "tod", the tolerance of difference.
            allocate: "tod" (every group loses its lowest U-Scores for the largest ToD <= alpha), "uniform" (the same
                share of every group), "global" (one ranking of all units), or a function (propose, protect, groups) ->
                the lowest level at which each unit goes, inf where it never does.
            min_keep: the fewest units that a group keeps.
            round_to: the number of units that a group keeps is rounded up to a multiple of this.
        """
        if not 0 <= alpha <= 1:
            raise PlanError(f"alpha is {alpha}; it is a share of units and lies between 0 and 1")
        keep = self.allocation(allocate, min_keep=min_keep, round_to=round_to).keep(alpha)
        return plan_of(self.sites, keep, self.example, alpha, self.frozen, self.settings)

    def allocation(self, allocate: str | Allocate = "tod", *, min_keep: int = 1, round_to: int = 1) -> Allocation:
        """The level at which each unit goes, and what has to hold at every level; arguments as of `plan`."""
        if min_keep < 1 or round_to < 1:
            raise PlanError(f"min_keep is {min_keep} and round_to is {round_to}; both are at least 1")
        level = levels(allocate, self.propose, self.protect, self.groups)
        units = {site.name: site.units for site in self.sites}
        equal, larger = (
            tuple(tuple(units[n] for n in names) for names in sets) for sets in (self.balanced, self.larger)
        )
        return Allocation(level, self.propose, self.groups, self.pieces, equal, larger, min_keep, round_to)

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
        inexact: bool = False,
        head_dim: bool = False,
        submodule: str = "",
    ) -> Scores:
        """Seeded random scores, for baselines and for tests that need no data; `example` is what the part takes."""
        graph = capture_around(exclude, part_of(model, submodule), example)
        options = {"inexact": inexact, "head_dim": head_dim}
        coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
        propose, protect = np.random.default_rng(seed).random((2, coupling.units))
        return scores_of(graph, coupling, (propose, protect), options | {"submodule": submodule}, {"random": seed})


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
    example, frozen = graph.meta["fxprune"]["example"], coupling.frozen()
    return Scores(
        *scores, groups, coupling.sites, coupling.pieces, example, frozen, settings, about, coupling.balanced,
        coupling.larger,
    )  # fmt: skip


def _names(frozen: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {str(reason): tuple(map(str, sites)) for reason, sites in frozen.items()}
