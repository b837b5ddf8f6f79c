"""Channels of the caller's choice: layers and their channels as given, and the channels that every layer then keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fxprune.caller.arguments import CHECKS, is_keywords, is_whole, shown, wanted
from fxprune.caller.arrays import Index
from fxprune.coupling.groups import Coupling
from fxprune.errors import PlanError, known_names
from fxprune.planning.kept import Keep
from fxprune.tracing.graph import ModelGraph

Channels = Mapping[str, Iterable[int]]
_SHOWN = 6  # channels in a message


def _each(doing: str) -> str:
    return f"it is a dict of layers and the channels to {doing}, such as {{'conv1': [0, 1, 5]}}"


CHECKS["kept"] = wanted(is_keywords, _each("keep"), PlanError)
CHECKS["removed"] = wanted(is_keywords, _each("remove"), PlanError)


def indices(name: str, given: Channels, coupling: Coupling, graph: ModelGraph) -> dict[str, Index]:
    """The channels of each layer that the argument `name` gives, as rising indices.

    Raises PlanError where there is no such layer, or an index is none of its channels or given twice.
    """
    widths = {site.name: site.width for site in coupling.sites}
    for layer in given:
        if layer not in widths:
            before = _before(layer, graph, widths)
            raise PlanError(
                f"{name}: {layer!r} has the channels of the layer before it: name {before!r}"
                if before
                else f"{name}: {unknown_layer(layer, widths)}"
            )
    return {layer: _of_layer(name, layer, channels, widths) for layer, channels in given.items()}


def _before(layer: str, graph: ModelGraph, layers: Collection[str]) -> str | None:
    """The layer with channels whose output, perhaps changed on the way, is the first input of another module."""
    node = next((node for node in graph.graph.nodes if node.op == "call_module" and node.target == layer), None)
    while node is not None and str(node.target) not in layers:
        node = next(iter(node.all_input_nodes), None)
    return node and str(node.target)


def _of_layer(name: str, layer: str, channels: Any, widths: Mapping[str, int]) -> Index:
    listed = channels.tolist() if isinstance(channels, (np.ndarray, torch.Tensor)) else channels
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise PlanError(f"{name}: the channels of {layer!r} are {shown(channels)}; give a list of indices")
    found = list(listed)
    if found and all(isinstance(entry, (bool, np.bool_)) for entry in found):
        raise PlanError(
            f"{name}: the channels of {layer!r} are a mask of True and False; give indices, such as "
            "mask.nonzero().flatten() of a tensor"
        )
    for channel in found:
        if not is_whole(channel, 0, widths[layer]):
            raise PlanError(
                f"{name}: {shown(channel)} is no channel of {layer!r}, which has {widths[layer]}: "
                f"give indices from 0 to {widths[layer] - 1}"
            )
    rising, counts = np.unique(np.array(found, dtype=np.int64), return_counts=True)
    if len(rising) < len(found):
        twice = ", ".join(map(str, rising[counts > 1][:_SHOWN].tolist()))
        raise PlanError(f"{name}: the channels of {layer!r} name {twice} more than once; give each once")
    return rising


def unknown_layer(layer: str, layers: Iterable[str]) -> str:
    """The message about a name that is none of the layers with channels."""
    known = known_names(layer, layers)
    return f"no layer that produces channels is called {layer!r}{known}; fxprune.couple lists them all"


def others(layers: Mapping[str, Index], widths: Mapping[str, int]) -> dict[str, Index]:
    """All other channels of each layer.

    >>> others({"conv": np.array([0, 2])}, {"conv": 4})
    {'conv': array([1, 3])}
    """
    return {layer: np.delete(np.arange(widths[layer]), channels) for layer, channels in layers.items()}


def with_coupled(removed: Mapping[str, Index], coupling: Coupling) -> dict[str, Index]:
    """For each layer, the channels to remove, and its channels that are coupled to those to remove of other layers."""
    sites = {site.name: site.units for site in coupling.sites}
    units = {layer: sites[layer][channels] for layer, channels in removed.items()}
    found = {}
    for layer, channels in removed.items():
        elsewhere = [u[u >= 0] for other, u in units.items() if other != layer]
        coupled = np.isin(sites[layer], np.concatenate([np.empty(0, dtype=np.int64), *elsewhere]))
        found[layer] = np.union1d(channels, np.flatnonzero(coupled))
    return found


def remaining(keep: Keep, removed: Mapping[str, Index], coupling: Coupling) -> dict[str, tuple[int, ...]]:
    """The channels that every layer keeps.

    The layers of `removed` lose exactly those channels, and every other layer the channels that are coupled to them.
    """
    gone = np.zeros(coupling.units + 1, dtype=bool)
    for site in coupling.sites:
        gone[site.units[removed.get(site.name, [])]] = True
    gone[-1] = False  # for channels that are always kept, whose unit is -1
    found = {}
    for site in coupling.sites:
        kept = np.array(keep.get(site.name, range(site.width)), dtype=np.int64)
        lost = np.isin(kept, removed[site.name]) if site.name in removed else gone[site.units[kept]]
        found[site.name] = tuple(kept[~lost].tolist())
    return found
