"""From the kept channels of each layer to the kept units, and whether the coupling allows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fxprune.caller.arrays import Flags, Index
from fxprune.coupling.groups import Coupling, Site
from fxprune.errors import PlanError

Keep = Mapping[str, Sequence[int]]


def check_indices(name: str, width: int, kept: Sequence[int]) -> None:
    """Raise PlanError where the kept channels of a layer are not rising indices below its width, or are none."""
    kept = tuple(kept)
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < width):
        raise PlanError(
            f"the plan's channels of {name!r} are not rising indices below its width {width}: {kept[:8]}..."
        )
    if not kept:
        raise PlanError(f"the plan keeps 0 of {width} channels of {name!r}: a layer keeps at least one")


def units_of(keep: Keep, widths: Mapping[str, int], coupling: Coupling, given: Collection[str] = ()) -> Flags:
    """The units of which every channel is kept, one bool per unit; `keep` and `widths` are those of a `Plan`.

    If layers contradict each other, the message names those of them that were `given`, if there are any.

    Raises PlanError where they name layers that the model lacks or give them other widths, drop a channel that cannot
    be removed, drop only a part of a unit, leave a layer without channels or inputs, keep different numbers in layers
    that share one size, or keep fewer experts than are chosen at once.
    """
    sites = {site.name for site in coupling.sites}
    for name in keep:
        if name not in sites:
            raise PlanError(
                f"the plan names {name!r}, which has no channels there: apply it to the model that it was made for"
            )
    total, removed = np.zeros((2, coupling.units), dtype=np.int64)
    for site in coupling.sites:
        np.add.at(total, site.units[site.units >= 0], 1)
        np.add.at(removed, site.units[_dropped(keep, widths, coupling, site)], 1)
    torn = np.flatnonzero((removed > 0) & (removed < total))
    if len(torn):
        raise PlanError(_torn(keep, coupling, int(torn[0]), given))
    kept: Flags = removed == 0
    for units in coupling.pieces:
        if not kept[units].any():
            names = [repr(site.name) for site in coupling.sites if np.isin(units, site.units).any()]
            raise PlanError(
                f"the plan drops all {len(units)} units of a slice that the model reads (of {', '.join(names[:3])}): "
                "keep at least one"
            )
    _check_balance(coupling, kept)
    return kept


def _dropped(keep: Keep, widths: Mapping[str, int], coupling: Coupling, site: Site) -> Index:
    """The channels of a site that are dropped."""
    kept, width = keep.get(site.name, ()), widths.get(site.name, 0)
    if site.name not in keep or (len(kept) == width and (site.units < 0).all()):
        return np.empty(0, dtype=np.int64)
    if width != site.width:
        raise PlanError(f"the plan was made for {width} channels of {site.name!r}, the model has {site.width}")
    check_indices(site.name, width, kept)
    dropped = np.delete(np.arange(width), np.array(kept, dtype=np.int64))
    stuck = dropped[site.units[dropped] < 0]
    if len(stuck):
        reasons = [reason for reason, names in coupling.frozen().items() if site.name in names]
        raise PlanError(
            f"the plan drops channel {stuck[0]} of {site.name!r} ({len(kept)} of {width} kept), which cannot be "
            f"removed ({'; '.join(reasons)}): keep it"
        )
    return dropped


def _torn(keep: Keep, coupling: Coupling, unit: int, given: Collection[str]) -> str:
    """The message for a unit of which a plan keeps only a part."""
    kept: list[str] = []
    dropped: list[str] = []
    for site in sorted(coupling.sites, key=lambda site: site.name not in given):
        channels = set(keep.get(site.name, range(site.width)))
        for channel in np.flatnonzero(site.units == unit).tolist():
            (kept if channel in channels else dropped).append(f"channel {channel} of {site.name!r}")
    return (
        f"the plan keeps {kept[0]} but drops {dropped[0]}, which must be kept or removed together "
        f"({len(kept)} channels kept, {len(dropped)} dropped of one unit): keep both or drop both"
    )


def _check_balance(coupling: Coupling, keep: Flags) -> None:
    """Raise where layers that share one size would get different ones, or a projection too large a one."""
    padded = np.append(keep, True)
    counts = {site.name: int(padded[site.units].sum()) for site in coupling.sites}
    kept = {site.name: f"{counts[site.name]} of {site.width} units of {site.name!r}" for site in coupling.sites}
    for first, other in ((first, other) for first, *others in coupling.balanced for other in others):
        if counts[first] != counts[other]:
            raise PlanError(
                f"the plan keeps {kept[first]} but {kept[other]}, which share one size: keep the same number of each"
            )
    for units, least in coupling.floors:
        if (count := int(keep[units].sum())) < least:
            names = [repr(site.name) for site in coupling.sites if np.isin(units, site.units).any()]
            raise PlanError(
                f"the plan keeps {count} of {len(units)} units of {names[0]}, of which {least} are chosen at once: "
                f"keep at least {least}"
            )
    for first, second in coupling.larger:
        if counts[first] <= counts[second]:
            raise PlanError(
                f"the plan keeps {kept[first]} and {kept[second]}: keep more units than they are projected to"
            )
