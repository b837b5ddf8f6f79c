"""A plan: the kept channels of each layer, as small and readable JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

from torch import nn

from fxprune.caller.arguments import CHECKS, check, instance
from fxprune.caller.arrays import Flags
from fxprune.caller.example import check_example
from fxprune.caller.file_kinds import check_kind
from fxprune.caller.files import regular, replacing
from fxprune.caller.isolation import undisturbed
from fxprune.caller.typed_json import from_plain
from fxprune.coupling.branch_units import SITE
from fxprune.coupling.collector import EXCLUDED, Exclude
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.coupling.interpreter import Unknown
from fxprune.coupling.kinds import BRANCHES
from fxprune.errors import PlanError, plural, visible
from fxprune.planning.bars import bars
from fxprune.planning.chosen import Channels, indices, others, remaining, with_coupled
from fxprune.planning.kept import check_indices, units_of
from fxprune.tracing.capture import capture_around, captured
from fxprune.tracing.graph import ModelGraph, captured_of
from fxprune.tracing.part import part_of
from fxprune.tracing.settings import check_settings, settings_of

FORMAT = 1
SHOWN = 6  # of the layers of a plan that lose the largest share of their channels
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
    plan at alpha 0.05: 2 of 3 channels kept, 1 of 1 layer narrowed
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

    @property
    def removed_branches(self) -> tuple[str, ...]:
        """The residual branches, or blocks, that the plan removes whole."""
        return tuple(site.removeprefix(SITE) for site, kept in self.keep.items() if site.startswith(SITE) and not kept)

    def __str__(self) -> str:
        level = "" if self.alpha is None else f" at alpha {self.alpha:g}"
        layers = {site: kept for site, kept in self.keep.items() if not site.startswith(SITE)}
        total, kept = sum(self.widths[site] for site in layers), sum(map(len, layers.values()))
        level += "" if self.budget is None else f" ({self.budget})"
        lost = {site: self.widths[site] - len(channels) for site, channels in layers.items()}
        most = sorted(filter(lost.get, lost), key=lambda site: -lost[site] / self.widths[site])
        narrowed = f"{len(most)} of {plural(len(layers), 'layer')} narrowed"
        lines = [f"plan{level}: {kept} of {total} channels kept, {narrowed}"]
        lines += [f"  {site}: {len(self.keep[site])} of {self.widths[site]}" for site in lost if site in most[:SHOWN]]
        lines += [f"  and {len(most) - SHOWN} more"] * (len(most) > SHOWN)
        if removed := self.removed_branches:
            lines.append(f"  {len(removed)} of {len(self.keep) - len(layers)} branches removed: {', '.join(removed)}")
        return visible("\n".join(lines))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        layers = [(site.removeprefix(SITE), len(kept), self.widths[site]) for site, kept in self.keep.items()]
        return visible(bars(str(self).partition("\n")[0], layers))

    @classmethod
    def from_kept(
        cls,
        model: nn.Module,
        example: Any,
        kept: Channels,
        *,
        exclude: Exclude = (),
        unknown: Unknown = "error",
        inexact: bool = False,
        head_dim: bool = False,
        query_heads: bool = False,
        blocks: bool | str = False,
        submodule: str = "",
    ) -> Plan:
        """The plan that keeps channels of the caller's choice, for instance by a criterion of one's own.

        Channels that are coupled to a removed one are removed too, in all layers; every other channel is kept.

        Args:
            model: the model to prune; it is not changed.
            example: a batch as the model (or its part) takes it.
            kept: for each layer that is to lose channels, those to keep: {"layer1.0.conv1": [0, 1, 5]}.
            exclude, unknown, inexact, head_dim, query_heads, submodule: see `compress`.
            blocks: whether residual branches can be named, too: {"branch:layers.3.mlp": []} removes that one whole.

        Raises:
            PlanError: there is no such layer or channel, a channel cannot be removed, two layers contradict each other,
                or layers that need one width would get several.

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> print(Plan.from_kept(net, torch.zeros(2, 4), {"0": [0, 2]}))
        plan: 4 of 5 channels kept, 1 of 2 layers narrowed
          0: 2 of 3
        """
        check(cls.from_kept, locals())
        options: dict[str, Any] = {"inexact": inexact, "head_dim": head_dim, "query_heads": query_heads}
        options["blocks"] = BRANCHES if blocks else ""
        graph = capture_around(exclude, part_of(model, submodule), example)
        with undisturbed():
            coupling = analyse(graph, exclude=exclude, unknown=unknown, **options)
        widths = {site.name: site.width for site in coupling.sites}
        removed = others(indices("kept", kept, coupling, graph), widths)
        settings = settings_of(graph) | {n: v for n, v in (options | {"submodule": submodule}).items() if v}
        keep = remaining({}, removed, coupling)
        units_of(keep, widths, coupling, kept)  # raises where the choice contradicts the coupling
        return cls(keep, widths, captured_of(graph).description, frozen=coupling.frozen(), settings=settings)

    def without(self, model: nn.Module, removed: Channels) -> Plan:
        """This plan without some more channels, and without those that are coupled to them.

        Args:
            model: the model that the plan is for; it is not changed.
            removed: layers, and indices among the channels of the original: {"layer1.0.conv1": [3, 5]}.

        Raises:
            PlanError: as `from_kept`, or the plan is not for this model.

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> plan = Plan.from_kept(net, torch.zeros(2, 4), {"0": [0, 2]})
        >>> plan.without(net, {"0": [2]}).keep["0"]
        (0,)
        """
        check(Plan.without, locals())
        part = part_of(model, self.submodule)
        with undisturbed():
            graph = captured(self.settings, part, self.example)
            coupling = coupling_of(graph, self)
        units_of(self.keep, self.widths, coupling)  # raises where the plan is for another model
        lost = with_coupled(indices("removed", removed, coupling, graph), coupling)
        keep = remaining(self.keep, lost, coupling)
        units_of(keep, self.widths, coupling, removed)
        return replace(self, keep=keep, alpha=None, budget=None, allocate=None)

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
                check_indices(name, site.of, site.keep)
            check_settings(file.settings, source)
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
            check_kind(file, "plan", PlanError)
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path} cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            why = "it is no text" if isinstance(error, UnicodeDecodeError) else f"{type(error).__name__}: {error}"
            raise PlanError(f"{path} is not a plan that Plan.save wrote ({why})") from error
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


def kept_units(plan: Plan, coupling: Coupling) -> Flags:
    """The units that a plan keeps, one bool per unit; raises PlanError as `units_of` does."""
    return units_of(plan.keep, plan.widths, coupling)


def coupling_of(graph: ModelGraph, plan: Plan) -> Coupling:
    """The coupling that `plan` was made for, with its exclusions and its options for grids and statistics."""
    options: dict[str, Any] = {
        name: bool(plan.settings.get(name, False)) for name in ("inexact", "head_dim", "query_heads")
    }
    options["blocks"] = str(plan.settings.get("blocks", ""))
    return analyse(graph, exclude=plan.frozen.get(EXCLUDED, ()), unknown="freeze", **options)
