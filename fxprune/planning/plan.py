"""A plan: the kept channels of each layer, as small and readable JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from fxprune.caller.arguments import CHECKS, instance
from fxprune.caller.arrays import Flags, Index
from fxprune.caller.example import check_example
from fxprune.caller.files import regular, replacing
from fxprune.caller.typed_json import from_plain
from fxprune.coupling.collector import EXCLUDED
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling, Site
from fxprune.errors import PlanError, visible
from fxprune.tracing.graph import ModelGraph
from fxprune.tracing.settings import check_settings

FORMAT = 1
LARGEST = 256 << 20  # bytes of a file; a million channels take ten million
BUDGETS = {"params": "parameters", "macs": "MACs", "latency": "latency"}


@dataclass(frozen=True, slots=True)
class Budget:
    """A share of the original's parameters ("params"), MACs ("macs") or latency that limited a plan.

    `achieved` is the plan's share: exact for parameters and MACs, an estimate for latency.

    >>> print(Budget("macs", 0.5, 0.4971))
    asked for 50.0% of the MACs, achieved 49.7%
    """

    of: str
    asked: float
    achieved: float

    def __post_init__(self) -> None:
        if self.of not in BUDGETS:
            raise PlanError(f"a budget is of {self.of!r}: it is of one of {', '.join(BUDGETS)}")

    def __str__(self) -> str:
        return f"asked for {self.asked:.1%} of the {BUDGETS[self.of]}, achieved {self.achieved:.1%}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The kept channels of each site.

    `keep` maps a site (a layer's module path, or a raw parameter's name) to the indices of its kept channels, `widths`
    to its number of channels. `example` describes the batch that capture needs (see `Plan.save`), and `alpha` is the
    level of the plan, or None. `frozen` says why some layers were left whole, and `settings` how the model was captured
    and coupled. `budget` is what was asked for in place of a level, if anything; `allocate` names the allocation of the
    level, None where it was the caller's own or is not known.

    >>> plan = Plan({"0": (0, 2)}, {"0": 3}, [{"tensor": [2, 4], "dtype": "float32"}], alpha=0.05)
    >>> print(plan)
    plan at alpha 0.05: 2 of 3 channels kept
      0: 2 of 3
    """

    keep: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    example: Any
    alpha: float | None = None
    frozen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    allocate: str | None = None

    @property
    def submodule(self) -> str:
        """The path of the part of the model that the plan is for; empty where it is for the whole."""
        return str(self.settings.get("submodule", ""))

    def __str__(self) -> str:
        level = "" if self.alpha is None else f" at alpha {self.alpha:g}"
        total, kept = sum(self.widths.values()), sum(map(len, self.keep.values()))
        level += "" if self.budget is None else f" ({self.budget})"
        lines = [f"plan{level}: {kept} of {total} channels kept"]
        lines += [f"  {site}: {len(channels)} of {self.widths[site]}" for site, channels in self.keep.items()]
        return visible("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts and lists for JSON."""
        sites = {site: {"of": self.widths[site], "keep": list(kept)} for site, kept in self.keep.items()}
        frozen = {reason: list(sites) for reason, sites in self.frozen.items()}
        content = {"fxprune_plan": FORMAT, "alpha": self.alpha, "example": self.example, "frozen": frozen}
        content |= {"budget": None if self.budget is None else asdict(self.budget), "allocate": self.allocate}
        return content | {"settings": dict(self.settings), "sites": sites}

    @classmethod
    def from_dict(cls, content: Any, source: object = "this") -> Plan:
        """The plan of a `to_dict`; `source` is its name in messages. Raises PlanError where it is not one."""
        try:
            if content["fxprune_plan"] != FORMAT:
                raise PlanError(
                    f"{source} has plan format {content['fxprune_plan']}, this fxprune reads {FORMAT}: update it"
                )
            file = from_plain(_PlanFile, content)
            for name, site in file.sites.items():
                _check_indices(name, site.of, site.keep)
            check_settings(file.settings)
            check_example(file.example)
            keep = {name: site.keep for name, site in file.sites.items()}
            widths = {name: site.of for name, site in file.sites.items()}
            return cls(keep, widths, file.example, file.alpha, file.frozen, file.settings, file.budget, file.allocate)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise PlanError(f"{source} is not a plan that Plan.save wrote ({type(error).__name__}: {error})") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, see `to_dict`; the file appears whole or not at all."""
        with replacing(path, PlanError) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Raises PlanError where the file is not one."""
        file = regular(path, PlanError, "read")
        try:
            size = file.stat().st_size
            if size > LARGEST:
                raise ValueError(f"it has {size:,} bytes, more than {LARGEST:,}")
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path} cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not a plan that Plan.save wrote ({type(error).__name__}: {error})") from error
        return cls.from_dict(content, path)


CHECKS["plan"] = instance(Plan, "give what Scores.plan or Plan.load gave", PlanError)


@dataclass(frozen=True, slots=True)
class _SiteEntry:
    """One site in a plan file: its width and its kept channels."""

    of: int
    keep: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _PlanFile:
    """The content of a plan file, whose format was checked."""

    alpha: float | None
    example: Any
    sites: Mapping[str, _SiteEntry]
    frozen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    allocate: str | None = None


def _check_indices(name: str, width: int, kept: tuple[int, ...]) -> None:
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < width):
        raise PlanError(f"the plan's channels of {name} are not rising indices below its width {width}: {kept[:8]}...")
    if not kept:
        raise PlanError(f"the plan keeps 0 of {width} channels of {name}: a layer keeps at least one")


def coupling_of(graph: ModelGraph, plan: Plan) -> Coupling:
    """The coupling that `plan` was made for, with its exclusions and its options for grids and statistics."""
    options = {name: bool(plan.settings.get(name, False)) for name in ("inexact", "head_dim")}
    return analyse(graph, exclude=plan.frozen.get(EXCLUDED, ()), unknown="freeze", **options)


def kept_units(plan: Plan, coupling: Coupling) -> Flags:
    """The units that a plan keeps, one bool per unit.

    Raises PlanError where the plan names layers that the model lacks or gives them other widths, drops a channel that
    cannot be removed, drops only a part of a unit, leaves a layer without channels or inputs, or keeps different
    numbers in layers that share one size.
    """
    sites = {site.name for site in coupling.sites}
    for name in plan.keep:
        if name not in sites:
            raise PlanError(
                f"the plan names {name}, which the model does not have: apply it to the model that it was made for"
            )
    total, removed = np.zeros((2, coupling.units), dtype=np.int64)
    for site in coupling.sites:
        np.add.at(total, site.units[site.units >= 0], 1)
        np.add.at(removed, site.units[_dropped(plan, site)], 1)
    torn = np.flatnonzero((removed > 0) & (removed < total))
    if len(torn):
        raise PlanError(_torn(plan, coupling, int(torn[0])))
    keep: Flags = removed == 0
    for units in coupling.pieces:
        if not keep[units].any():
            names = [site.name for site in coupling.sites if np.isin(units, site.units).any()]
            raise PlanError(
                f"the plan drops all {len(units)} units of a slice that the model reads (of {', '.join(names[:3])}): "
                "keep at least one"
            )
    _check_balance(coupling, keep)
    return keep


def _dropped(plan: Plan, site: Site) -> Index:
    """The channels of a site that the plan drops."""
    kept, width = plan.keep.get(site.name, ()), plan.widths.get(site.name, 0)
    if site.name not in plan.keep or (len(kept) == width and (site.units < 0).all()):
        return np.empty(0, dtype=np.int64)
    if width != site.width:
        raise PlanError(f"the plan was made for {width} channels of {site.name}, the model has {site.width}")
    _check_indices(site.name, width, tuple(kept))
    dropped = np.delete(np.arange(width), np.array(kept, dtype=np.int64))
    stuck = dropped[site.units[dropped] < 0]
    if len(stuck):
        raise PlanError(
            f"the plan drops channel {stuck[0]} of {site.name} ({len(kept)} of {width} kept), "
            "which cannot be removed: print the groups with couple() to see why"
        )
    return dropped


def _torn(plan: Plan, coupling: Coupling, unit: int) -> str:
    """The message for a unit of which a plan keeps only a part."""
    kept: list[str] = []
    dropped: list[str] = []
    for site in coupling.sites:
        channels = set(plan.keep.get(site.name, range(site.width)))
        for channel in np.flatnonzero(site.units == unit).tolist():
            (kept if channel in channels else dropped).append(f"channel {channel} of {site.name}")
    return (
        f"the plan keeps {kept[0]} but drops {dropped[0]}, which must be kept or removed together "
        f"({len(kept)} channels kept, {len(dropped)} dropped of one unit): keep both or drop both"
    )


def _check_balance(coupling: Coupling, keep: Flags) -> None:
    """Raise where layers that share one size would get different ones, or a projection too large a one."""
    padded = np.append(keep, True)
    counts = {site.name: int(padded[site.units].sum()) for site in coupling.sites}
    kept = {site.name: f"{counts[site.name]} of {site.width} units of {site.name}" for site in coupling.sites}
    for first, other in ((first, other) for first, *others in coupling.balanced for other in others):
        if counts[first] != counts[other]:
            raise PlanError(
                f"the plan keeps {kept[first]} but {kept[other]}, which share one size: keep the same number of each"
            )
    for first, second in coupling.larger:
        if counts[first] <= counts[second]:
            raise PlanError(
                f"the plan keeps {kept[first]} and {kept[second]}: keep more units than they are projected to"
            )
