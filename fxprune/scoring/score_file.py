"""The data of scores, its checks, and the file that holds it: an .npz of plain arrays and a header in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, get_type_hints
from zipfile import BadZipFile

import numpy as np

from fxprune.caller.arguments import is_whole
from fxprune.caller.arrays import BROKEN, Index, Scalars, read, write
from fxprune.caller.example import check_example
from fxprune.caller.file_kinds import check_kind
from fxprune.caller.files import regular
from fxprune.caller.typed_json import from_plain
from fxprune.coupling.groups import Key, Site
from fxprune.coupling.kinds import BRANCHES
from fxprune.errors import PlanError
from fxprune.planning.allocation import BESIDE, ONLY
from fxprune.planning.costs import Costs
from fxprune.planning.curves import Curves
from fxprune.planning.latency import Latency
from fxprune.planning.widths import Products, Widths
from fxprune.scoring.moments import Moments
from fxprune.tracing.settings import check_settings

FORMAT = 3
_IN_HEADER = (
    "groups", "example", "frozen", "settings", "about", "balanced", "larger", "even", "min_keep", "round_to",
    "kinds", "repeats", "counts", "equal_blocks", "blocks",
)  # fmt: skip
_LATER = ("kinds", "repeats", "counts", "equal_blocks", "blocks")  # which the first files of this format lack
_MANY = 1 << 31


@dataclass(frozen=True, slots=True, eq=False)
class ScoreData:
    """The fields of `Scores`, described there."""

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
    even: tuple[tuple[tuple[int, ...], ...], ...] = ()
    costs: Costs | None = None
    times: Latency | None = None
    moments: Mapping[Key, Moments] = field(default_factory=dict)
    channels: Index | None = None
    curves: Curves | None = None
    magnitudes: Scalars | None = None
    min_keep: int = 1
    round_to: dict[str, int] | int = 1
    floors: tuple[tuple[Index, int], ...] = ()
    kinds: tuple[str, ...] = ()
    repeats: tuple[tuple[int, ...], ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()
    equal_blocks: bool = False
    blocks: str = ""


def write_scores(path: str | PathLike[str], scores: ScoreData) -> None:
    """Write scores in one step. Raises PlanError where that fails."""
    header: dict[str, Any] = {name: getattr(scores, name) for name in _IN_HEADER}
    header |= {
        "fxprune_scores": FORMAT,
        "sites": [site.name for site in scores.sites],
        "pieces": len(scores.pieces),
        "floors": [least for _, least in scores.floors],
        "costs": scores.costs and {"samples": scores.costs.samples, "inexact": scores.costs.inexact},
        "times": scores.times and {"rest": scores.times.rest, "device": scores.times.device},
        "moments": list(scores.moments),
    }
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    arrays |= {"propose": scores.propose, "protect": scores.protect}
    arrays |= {f"site{i}": site.units for i, site in enumerate(scores.sites)}
    arrays |= {f"piece{i}": units for i, units in enumerate(scores.pieces)}
    arrays |= {f"floor{i}": units for i, (units, _) in enumerate(scores.floors)}
    others = {"channels": scores.channels, "magnitudes": scores.magnitudes}
    arrays |= {name: array for name, array in others.items() if array is not None}
    parts: dict[str, Any] = {"costs": scores.costs, "times": scores.times, "curves": scores.curves}
    parts |= {f"moments{i}": moments for i, moments in enumerate(scores.moments.values())}
    for name, part in parts.items():
        arrays |= {f"{name}_{key}": array for key, array in part.arrays().items()} if part else {}
    write(path, arrays, PlanError)


def read_scores(path: str | PathLike[str]) -> dict[str, Any]:
    """The fields of the scores in a file. Raises PlanError where it is not one that `write_scores` wrote."""
    file = regular(path, PlanError, "read")
    try:
        check_kind(file, "scores", PlanError)
        arrays = read(file)
        header = json.loads(arrays["header"].tobytes())
        if header["fxprune_scores"] != FORMAT:
            raise PlanError(
                f"{path} has score format {str(header['fxprune_scores'])[:20]}, this fxprune reads {FORMAT}: update it"
            )
        fields = _fields(header, arrays)
        _check_consistent(ScoreData(**fields))
        check_settings(fields["settings"], path)
        return fields
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error})") from error
    except BROKEN as error:
        why = "it is no .npz, or is cut off" if isinstance(error, BadZipFile) else f"{type(error).__name__}: {error}"
        raise PlanError(f"{path} is not a score file that Scores.save wrote ({why})") from error


def _fields(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ScoreData` from a file's header and arrays."""
    hints = get_type_hints(ScoreData)
    fields = {
        name: from_plain(hints[name], header[name], name) for name in _IN_HEADER if name in header or name not in _LATER
    }
    costs, times = header["costs"], header["times"]
    if costs:
        inexact = from_plain(tuple[str, ...], costs["inexact"], "costs.inexact")
        costs = Costs.of_arrays(_part(arrays, "costs"), from_plain(int, costs["samples"], "costs.samples"), inexact)
    if times:
        rest, device = from_plain(float, times["rest"], "times.rest"), from_plain(str, times["device"], "times.device")
        times = Latency.of_arrays(_part(arrays, "times"), rest, device)
    names = from_plain(tuple[str, ...], header["sites"], "sites")
    floors = from_plain(tuple[int, ...], header.get("floors", ()), "floors")
    edges = from_plain(tuple[tuple[str, str], ...], header["moments"], "moments")
    return fields | {
        "propose": arrays["propose"], "protect": arrays["protect"], "channels": arrays.get("channels"),
        "magnitudes": arrays.get("magnitudes"),
        "sites": tuple(Site(name, arrays[f"site{i}"]) for i, name in enumerate(names)),
        "pieces": tuple(arrays[f"piece{i}"] for i in range(header["pieces"])), "costs": costs, "times": times,
        "floors": tuple((arrays[f"floor{i}"], least) for i, least in enumerate(floors)),
        "curves": Curves.of_arrays(arrays, "curves_") if "curves_starts" in arrays else None,
        "moments": {edge: Moments.of_arrays(_part(arrays, f"moments{i}")) for i, edge in enumerate(edges)},
    }  # fmt: skip


def _part(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arrays of one part, by their own names."""
    return {key.removeprefix(f"{name}_"): arrays[key] for key in arrays if key.startswith(f"{name}_")}


def _check_consistent(scores: ScoreData) -> None:
    """Raise ValueError, TypeError or PlanError where a number refers to nothing, or shapes disagree."""
    units = len(scores.propose)
    others = {} if scores.magnitudes is None else {"magnitudes": scores.magnitudes}
    for name, array in ({"propose": scores.propose, "protect": scores.protect} | others).items():
        _check(array.shape == (units,) and array.dtype == np.float64 and not np.isnan(array).any(), name)
    ends = [0, *(end for _, _, end in scores.groups)]
    starts = [*(start for _, start, _ in scores.groups), units]
    _check(ends == starts and all(start < end for _, start, end in scores.groups), "groups")
    names = {site.name for site in scores.sites}
    _check(len(names) == len(scores.sites), "sites")
    _check(all(names.issuperset(each) and each for each in (*scores.balanced, *scores.larger)), "balanced")
    _check(all(len(pair) == 2 for pair in scores.larger), "larger")
    for site in scores.sites:
        _check_range(site.units, -1, units, f"the units of {site.name}")
    for axis in (axis for axes in scores.even for axis in axes):
        _check_range(np.array(axis, dtype=np.int64), -1, units, "even")
    for chosen, least in (*((piece, 1) for piece in scores.pieces), *scores.floors):
        _check_range(chosen, 0, units, "a piece or a floor")
        _check(0 < least <= len(chosen), "a piece or a floor")
    if scores.channels is not None:
        _check_range(scores.channels, 0, 1 << 62, "channels")
        _check(len(scores.channels) == units, "channels")
    for moments in scores.moments.values():
        size = len(moments.mean)
        _check(moments.mean.ndim == 1 and moments.covariance.shape in ((size,), (size, size)), "moments")
    if scores.costs is not None:
        _check_products(scores.costs.widths, (scores.costs.params, scores.costs.flops), units)
        _check(0 < scores.costs.samples < _MANY, "costs")
    if scores.times is not None:
        _check_times(scores.times, units)
    if scores.curves is not None:
        _check_curves(scores.curves, units, len(scores.groups))
    _check_limits(scores)
    check_example(scores.example)


def _check_times(times: Latency, units: int) -> None:
    """Raise where the times of nodes are not those of one table."""
    _check_products(times.widths, (times.work,), units)
    _check_range(times.node, 0, len(times.seconds), "times")
    _check(len(times.node) == len(times.work.factor), "times")
    _check(times.seconds.ndim == 2 and times.seconds.shape == times.works.shape and times.seconds.size, "times")
    _check(times.seconds.dtype == times.works.dtype == np.float64, "times")


def _check_curves(curves: Curves, units: int, groups: int) -> None:
    """Raise where curves are not those of at most so many groups with so many units."""
    _check_range(curves.starts, 0, len(curves.depths) + 1, "curves")
    _check_range(curves.depths, 1, units, "curves")
    _check(curves.values.shape == curves.depths.shape and curves.values.dtype == np.float64, "curves")
    _check(bool(np.isfinite(curves.values).all() and (np.diff(curves.starts) >= 0).all()), "curves")
    _check(curves.order.ndim == 1 and np.array_equal(np.sort(curves.order), np.arange(units)), "curves")
    _check(len(curves.starts) <= groups + 1 and curves.starts[-1:] == [len(curves.depths)], "curves")


def _check_limits(scores: ScoreData) -> None:
    """Raise where limits of plans are no whole numbers, or groups repeat that are missing or differ in size."""
    multiples = scores.round_to.values() if isinstance(scores.round_to, Mapping) else [scores.round_to]
    whole = all(is_whole(number, below=_MANY) for number in (scores.min_keep, *multiples))
    _check(whole, "min_keep and round_to")
    sizes = dict(enumerate(end - start for _, start, end in scores.groups))
    _check(len(scores.kinds) in (0, len(sizes)), "kinds")
    _check(len(scores.counts) in (0, len(sizes)), "counts")
    _check(scores.blocks in ("", BESIDE, ONLY) and BRANCHES not in scores.kinds[:-1], "blocks")
    _check(all(len({sizes[number] for number in numbers}) == 1 for numbers in scores.repeats), "repeats")


def _check(holds: object, part: str) -> None:
    if not holds:
        raise ValueError(f"{part}: its shapes or numbers contradict the rest of the file")


def _check_range(array: Index, low: int, high: int, part: str) -> None:
    """Raise where an array is no vector of integers from `low` up to below `high`."""
    _check(array.ndim == 1 and array.dtype == np.int64, part)
    _check(array.size == 0 or (array.min() >= low and array.max() < high), part)


def _check_products(widths: Widths, tables: Iterable[Products], units: int) -> None:
    """Raise where widths count missing units, or products multiply missing widths."""
    count = len(widths.fixed)
    _check_range(widths.fixed, 0, 1 << 62, "widths")
    _check_range(widths.units, 0, units, "widths")
    _check_range(widths.starts, 0, len(widths.units) + 1, "widths")
    _check(len(widths.starts) == count + 1 and (np.diff(widths.starts) >= 0).all(), "widths")
    _check(widths.starts[0] == 0 and widths.starts[-1] == len(widths.units), "widths")
    for table in tables:
        _check_range(table.factor, -(1 << 62), 1 << 62, "products")
        for array, low in ((table.axes, 0), (table.vanishing, -1)):
            _check(array.ndim == 2 and len(array) == len(table.factor), "products")
            _check_range(array.reshape(-1), low, count, "products")
