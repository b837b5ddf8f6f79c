"""What the units of a group are: heads, places in heads, hidden units, experts; and groups that blocks repeat."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from fxprune.caller.arrays import Index
from fxprune.coupling.branches import ExpertNodes
from fxprune.coupling.collector import Collector
from fxprune.coupling.experts import is_expert
from fxprune.coupling.grids import present_labels, units_at
from fxprune.coupling.groups import Coupling, Group

HEADS, HEAD_DIM, EXPERTS, EXPERT_UNITS, HIDDEN = "heads", "head_dim", "experts", "expert_units", "hidden"
BRANCHES = "branches"  # whole ones, whose numbers no multiple rounds
KINDS = (HEADS, HEAD_DIM, HIDDEN, EXPERTS, EXPERT_UNITS)
_BLOCKS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def with_kinds(
    groups: Iterable[Group], collector: Collector, merged: Index, unit_of: Index, branches: Iterable[ExpertNodes]
) -> tuple[Group, ...]:
    """The groups, with the kinds of their units: "hidden" where these are of no other kind."""
    of_experts = is_expert(collector, merged)
    experts, attended = (
        np.unique(np.concatenate([np.empty(0, np.int64), *(units_at(unit_of, present_labels(x)) for x in labels)]))
        for labels in (collector.experts, collector.attended)
    )
    inside = {str(source.target) for own in branches for node in own.nodes for source in (node, *node.all_input_nodes)}
    for slot, (start, size) in collector.slots.items():
        if of_experts[merged[start : start + size]].any():
            inside |= {slot.owner, slot.owner.removesuffix(".weight")}

    def kind(group: Group) -> str:
        if np.isin(group.units, experts).any():
            return EXPERTS
        if any(site.name in inside or f"{site.name}.weight" in inside for site in group.sites):
            return EXPERT_UNITS
        if np.isin(group.units, attended).any():
            return HEADS if _are_blocks(group) else HEAD_DIM
        return HIDDEN

    return tuple(replace(group, kind=kind(group)) for group in groups)


def _are_blocks(group: Group) -> bool:
    """Whether a unit is neighbouring channels of a layer, as a head is, and not one or scattered ones."""
    runs = (site.units[1:][site.units[1:] == site.units[:-1]] for site in group.sites)
    return any(np.isin(run, group.units).any() for run in runs)


def repeated(
    coupling: Coupling, modules: Mapping[str, nn.Module], known: Iterable[Collection[str]] = ()
) -> tuple[tuple[int, ...], ...]:
    """Sets of the numbers of prunable groups that lie in blocks that repeat, at the same place of each.

    Blocks are modules of one class in one `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`, whose names differ by a
    number alone. The groups have the same kind, the same number of units, and the same layers. Layers of groups that
    are `known` to keep equal numbers come first.
    """
    found: dict[object, list[int]] = {}
    for number, group in enumerate(coupling.prunable):
        if own := [names for names in known if any(site.name in names for site in group.sites)]:
            found.setdefault((len(group), tuple(own[0])), []).append(number)
            continue
        layers = tuple(sorted((place_in_block(site.name, modules), group.channels(site)) for site in group.sites))
        found.setdefault((group.kind, len(group), layers), []).append(number)
    return tuple(tuple(numbers) for numbers in found.values() if len(numbers) > 1)


def place_in_block(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of a layer with the class of each block in place of its number.

    >>> block = nn.Sequential(nn.Linear(2, 2))
    >>> net = nn.ModuleList([block, block])
    >>> place_in_block("1.0", dict(net.named_modules(remove_duplicate=False)))
    '* Sequential.0'
    """
    names, found = path.split("."), list[str]()
    for end, name in enumerate(names, 1):
        parent, own = (modules.get(".".join(names[:stop])) for stop in (end - 1, end))
        is_block = isinstance(parent, _BLOCKS) and own is not None and any(True for _ in own.children())
        found.append(f"{re.sub(r'[0-9]+', '*', name)} {type(own).__name__}" if is_block else name)
    return ".".join(found)
