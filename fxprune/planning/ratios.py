"""Ratios by layer: the share of its units that the caller removes from each group of some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import numpy as np

from fxprune.caller.arguments import CHECKS, is_keywords, is_number, shown
from fxprune.caller.arrays import Scalars
from fxprune.errors import PlanError
from fxprune.planning.allocation import Groups
from fxprune.planning.chosen import unknown_layer

Ratios = Mapping[str, float]

_WANTED = "a share of the units to remove, at least 0 and less than 1"


def _check_ratios(name: str, value: Any) -> None:
    """Raise where ratios are not a dict of names and shares."""
    if not is_keywords(value):
        example = "{'layer1.0.conv1': 0.5, 'layer2.*': 0.25}"
        raise PlanError(f"{name} is {shown(value)}; it is a dict of layers or patterns, each with {_WANTED}: {example}")
    for layer, share in value.items():
        if not (is_number(share) and 0 <= share < 1):
            raise PlanError(f"{name}: {layer!r} has {shown(share)}; give {_WANTED}")


CHECKS["ratios"] = _check_ratios


def fixed(level: Scalars, propose: Scalars, groups: Groups, layers: Sequence[Sequence[str]], ratios: Ratios) -> Scalars:
    """The levels, with the groups that `ratios` name decided: -inf for the units to remove, inf for those to keep.

    Of a group of n units, round(ratio * n) are removed, the lowest by `propose` first. `layers` are each group's.

    Raises PlanError where two layers of a group are given different ratios.

    >>> fixed(np.zeros(3), np.array([3.0, 1.0, 2.0]), [("a", 0, 3)], [("a", "b")], {"a": 0.3, "other.*": 0.5})
    array([ inf, -inf,  inf])
    """
    level = level.copy()
    for (_, start, end), names in zip(groups, layers, strict=True):
        ratio = _ratio_of(names, ratios)
        if ratio is not None:
            first = np.argsort(propose[start:end], kind="stable")[: round(ratio * (end - start))]
            level[start:end] = np.inf
            level[start + first] = -np.inf
    return level


def _ratio_of(layers: Sequence[str], ratios: Ratios) -> float | None:
    """The ratio of a group: that of a layer's own name, or else of a pattern; None where there is neither."""
    own = {layer: (layer, ratios[layer]) for layer in layers if layer in ratios}
    by_pattern = [(entry, share) for entry, share in ratios.items() if any(matches(entry, layer) for layer in layers)]
    given = {share: entry for entry, share in own.values() or by_pattern}
    if len(given) > 1:
        (one, first), (two, second), *_ = ((share, entry) for share, entry in given.items())
        raise PlanError(
            f"ratios: {first!r} asks for {one:g} and {second!r} for {two:g} of the same units, those of "
            f"{', '.join(map(repr, layers[:3]))}: give both one ratio"
        )
    return next(iter(given), None)


def check_used(ratios: Ratios, layers: Sequence[str], frozen: Mapping[str, Sequence[str]]) -> None:
    """Raise PlanError where an entry of `ratios` names none of the layers that can lose channels."""
    for entry in ratios:
        if any(matches(entry, layer) for layer in layers):
            continue
        for reason, whole in frozen.items():
            if any(matches(entry, layer) for layer in whole):
                raise PlanError(f"ratios: {entry!r} cannot lose channels: {reason}; leave it out")
        raise PlanError(f"ratios: {unknown_layer(entry, layers)}")


def matches(pattern: str, layer: str) -> bool:
    """Whether a name or a glob pattern is that of a layer, or of a module that holds it.

    >>> matches("layer1", "layer1.0.conv1"), matches("layer?.*", "layer1.0.conv1"), matches("layer1", "layer12")
    (True, True, False)
    """
    return any(fnmatchcase(path, pattern) for path in accumulate(layer.split("."), "{}.{}".format))
