"""Plain models of transformers: which widths the fields of a configuration say, and the class built by them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fxprune.caller.arrays import Flags
from fxprune.caller.isolation import device_of, undisturbed
from fxprune.caller.tensors import named_tensors, put
from fxprune.coupling.groups import Coupling, Group
from fxprune.coupling.kinds import BRANCHES, EXPERT_UNITS, EXPERTS, HEAD_DIM, HEADS, HIDDEN
from fxprune.errors import NarrowError, error_text
from fxprune.planning.planned import Planned
from fxprune.rewriting.removed_branches import removed_residuals
from fxprune.rewriting.shorter_lists import depth_fields, entries_of, renaming, shorten_config
from fxprune.rules.vocabulary import Slot
from fxprune.tracing.graph import ClassLimits

FIELDS: dict[str, tuple[str, ...]] = {
    HEADS: (
        "num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads", "n_head", "n_heads",
        "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads",
        "num_decoder_attention_heads", "linear_num_key_heads", "linear_num_value_heads",
    ),
    HEAD_DIM: ("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"),
    HIDDEN: (
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size",
        "hidden_dim", "mlp_dim", "encoder_intermediate_size", "shared_expert_intermediate_size",
        "moe_intermediate_size", "mlp_ratio",
    ),
    EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    EXPERT_UNITS: ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "expert_dim"),
}  # fmt: skip
RATIOS = ("mlp_ratio",)  # fields that hold a share of another width
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)  # numbers of units that are removed at once, where a class has a rule
_PARTS = range(2, 9)  # shares of all units that are tried, too
OWN_CLASS = "use own_class=True in place of plain=True"
_REMEDY = f"{OWN_CLASS}, and save_pretrained of fxprune.integrations.huggingface"
_TOGETHER = 2  # fields that change together, such as the numbers of query heads and of key/value heads

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Change:
    """Fields `names` of the configuration at `path` in a model's, which say how many units some groups keep.

    Each of these `groups`, all of one kind, has so many `units`; they keep equal numbers, multiples of `step`, or one
    of `counts` where a rule of the class leaves no others. `pins` are other fields that have to be written out, because
    the class computes them from these.
    """

    kind: str
    path: str
    names: tuple[str, ...]
    groups: tuple[int, ...]
    units: int
    step: int
    pins: tuple[tuple[str, int], ...] = ()
    counts: tuple[int, ...] = ()

    def written(self, config: PretrainedConfig, kept: int) -> bool:
        """Change a configuration to so many kept units; False where its fields are no multiples of the units."""
        own = _inner(config, self.path)
        for name in self.names:
            new = _share(name, getattr(own, name), kept, self.units)
            if new is None:
                return False
            setattr(own, name, new)
        for name, value in self.pins:
            setattr(own, name, value)
        return True


def _share(name: str, value: float | None, kept: int, units: int) -> float | None:
    """The value of a field for so many kept units; None where it is no multiple of all units.

    Of a ratio, the least that gives the number of kept units when it is cut to a whole number.

    >>> _share("d_ff", 48, 9, 12), _share("d_ff", None, 9, 12), _share("n_head", 5, 2, 4), _share("mlp_ratio", 4, 9, 12)
    (36, 9, None, 3)
    """
    if value is None:
        return kept
    if name not in RATIOS:
        return None if value % units else int(value) // units * kept
    exact = value * kept / units
    if exact.is_integer():
        return int(exact)  # some configurations take whole ratios alone
    return exact if int(exact * units / value) == kept else math.nextafter(exact, math.inf)


def changes_of(model: PreTrainedModel, coupling: Coupling) -> tuple[Change, ...]:
    """The fields of a model's configuration that say the widths of its groups, found by trying.

    A field of `FIELDS`, or two at once, is changed as if some groups had fewer units, and the class is built on the
    meta device. Where all of its parameters have the shapes that the removal gives, the fields are those of the groups.

    Raises:
        NarrowError: there are none, or the configuration does not build the model.
    """
    whole, found, taken = built_shapes(model), list[Change](), set[int]()
    for change in _candidates(model.config, coupling):
        known = _tried(model, change, coupling, whole)
        if known is not None and taken.isdisjoint(known.groups):
            found.append(known)
            taken.update(known.groups)
    if not found:
        held = (name for _, own in _inside(model.config) for names in FIELDS.values() for name in _held(own, names))
        raise NarrowError(
            f"{type(model).__name__} cannot be built narrower by its configuration: no change of "
            f"{', '.join(dict.fromkeys(held)) or 'its fields'} gives the shapes that pruning gives: {_REMEDY}"
        )
    return tuple(found)


def built_shapes(model: PreTrainedModel) -> Shapes:
    """The shapes of a model's parameters, which have to be those of its class built by its configuration.

    Raises:
        NarrowError: they are not.
    """
    whole, name = _shapes(type(model), model.config), type(model).__name__
    if isinstance(whole, str):
        raise NarrowError(f"{name} cannot be built by its configuration alone ({whole}): {_REMEDY}")
    held = {key: tuple(p.shape) for key, p in model.named_parameters()}
    if odd := sorted(key for key in {*whole, *held} if whole.get(key) != held.get(key)):
        tied = {id(p) for key, p in model.named_parameters(remove_duplicate=False) if key in odd}
        shared = any(id(p) in tied for key, p in model.named_parameters() if key not in odd)
        found = held.get(odd[0]) or ("one tensor with another parameter" if shared else "missing")
        other = odd[0] in held and odd[0] in whole
        remedy = "prune the model that it was made from" if other else "set tie_word_embeddings as the model has it"
        raise NarrowError(
            f"{name} is not what its configuration builds: {odd[0]} is {found} in the model, and "
            f"{whole.get(odd[0]) or 'missing or tied'} by the configuration: {remedy}, or {_REMEDY}"
        )
    return whole


def _step_of_experts(model: PreTrainedModel) -> int:
    """The multiple of units that experts need: rows of whole 16 bytes, where one kernel multiplies all of them."""
    how = str(getattr(model.config.get_text_config(), "_experts_implementation", ""))
    return 16 // model.dtype.itemsize if "grouped" in how else 1


def _candidates(config: PretrainedConfig, coupling: Coupling) -> Iterator[Change]:
    """The fields that may say the widths of groups; single ones first."""
    sizes = {kind: sorted({len(g) for g in coupling.prunable if g.kind == kind and len(g) > 1}) for kind in FIELDS}
    for together in range(1, _TOGETHER + 1):
        for path, own in _inside(config):
            for kind, names in FIELDS.items():
                for chosen in combinations(_held(own, names), together):
                    for units in sizes[kind]:
                        for pins in _pins(kind, own):
                            yield Change(kind, path, chosen, (), units, 1, pins)


def _held(config: PretrainedConfig, names: Sequence[str]) -> list[str]:
    """Those names of fields that a configuration has, with a number or None."""
    held = config.to_dict()
    return [name for name in names if isinstance(held.get(name, ""), (float if name in RATIOS else int) | int | None)]


def _pins(kind: str, config: PretrainedConfig) -> list[tuple[tuple[str, int], ...]]:
    """The fields that have to be written with others: the size of heads, which many classes compute from their number.

    Only a class that reads it can be built with other numbers of heads.
    """
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if kind != HEADS or not heads or not width or getattr(config, "head_dim", None) is not None:
        return [()]
    return [(), (("head_dim", width // heads),)]


def _tried(model: PreTrainedModel, change: Change, coupling: Coupling, whole: Shapes) -> Change | None:
    """A candidate with the groups whose widths it says, and the step; None where it says those of no groups."""
    for step in sorted({*_STEPS, *(change.units // parts for parts in _PARTS)}):
        if step < 1 or change.units % step or step >= change.units:
            continue
        config = copy.deepcopy(model.config)
        try:
            shapes = _shapes(type(model), config) if change.written(config, change.units - step) else None
        except Exception:  # noqa: BLE001 - whatever a configuration's own checks raise
            shapes = "refused"
        if isinstance(shapes, str):
            continue  # a rule of the class
        if shapes is None or shapes.keys() != whole.keys():
            return None
        groups = _touched(change, coupling, whole, shapes)
        if groups and shapes == _without(coupling, whole, groups, step):
            least = _step_of_experts(model) if change.kind == EXPERT_UNITS else 1
            return _with_counts(model, replace(change, groups=groups, step=math.lcm(step, least)))
        return None
    return None


def _with_counts(model: PreTrainedModel, change: Change) -> Change:
    """A change with the numbers of heads or experts that the class takes, if they are not the multiples of its step."""
    if change.kind not in (HEADS, EXPERTS):
        return change

    def takes(count: int) -> bool:
        config = copy.deepcopy(model.config)
        if not change.written(config, count) or _broken(config):
            return False
        return count % change.step == 0 or not isinstance(_shapes(type(model), config), str)

    counts = tuple(filter(takes, range(1, change.units + 1)))
    alike = counts == tuple(range(change.step, change.units + 1, change.step))
    return change if alike else replace(change, step=1, counts=counts)


def _broken(config: PretrainedConfig) -> str:
    """What a configuration's own checks say against it; empty for nothing."""
    for _, own in _inside(config):
        validate = getattr(own, "validate", lambda: None)  # transformers before 5 has none
        try:
            validate()
        except Exception as error:  # noqa: BLE001 - whatever these raise
            return error_text(error.__cause__ or error)
    return ""


def _touched(change: Change, coupling: Coupling, whole: Shapes, shapes: Shapes) -> tuple[int, ...]:
    """The groups of a candidate's size that own units along axes that changed."""
    numbers = set[int]()
    owner = np.repeat(np.arange(len(coupling.prunable)), [len(group) for group in coupling.prunable])
    for name, shape in whole.items():
        for axis, size in enumerate(shape):
            if shapes[name][axis : axis + 1] != (size,):
                units = _units_along(coupling, name, axis)
                numbers.update(np.unique(owner[units[units >= 0]]).tolist())
    groups = coupling.prunable
    return tuple(sorted(n for n in numbers if len(groups[n]) == change.units))


def _units_along(coupling: Coupling, name: str, axis: int) -> Any:
    """The units of the indices along an axis of a parameter, -1 for those that are always kept."""
    start, size = coupling.slots.get(Slot(name, axis), (0, 0))
    return coupling.unit_of[start : start + size]


def _without(coupling: Coupling, whole: Shapes, groups: Sequence[int], step: int) -> Shapes:
    """The shapes of all parameters once some groups lose so many units each, the last ones."""
    prunable = coupling.prunable
    gone = np.concatenate([np.arange(prunable[n].units.stop - step, prunable[n].units.stop) for n in groups])

    def left(name: str, axis: int, size: int) -> int:
        return size - int(np.isin(_units_along(coupling, name, axis), gone).sum())

    return {name: tuple(left(name, axis, size) for axis, size in enumerate(shape)) for name, shape in whole.items()}


def _shapes(kind: type[PreTrainedModel], config: PretrainedConfig) -> Shapes | str:
    """The shapes of the parameters of a class built by a configuration; its error where it refuses that."""
    if broken := _broken(config):
        return broken
    try:
        with undisturbed(), torch.device("meta"):
            return {name: tuple(p.shape) for name, p in kind(copy.deepcopy(config)).named_parameters()}
    except Exception as error:  # noqa: BLE001 - whatever a class's own checks raise
        return error_text(error)


def _inside(config: PretrainedConfig, path: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """A configuration and those in it, with their paths."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _inside(value, f"{path}.{name}".lstrip("."))


def _inner(config: PretrainedConfig, path: str) -> Any:
    found: Any = config
    for name in path.split(".") if path else ():
        found = getattr(found, name)
    return found


def limits_by(changes: Sequence[Change], coupling: Coupling, config: PretrainedConfig) -> ClassLimits:
    """What can be pruned where the configuration has to say it: the groups of the changes, by equal numbers."""
    groups, said = coupling.prunable, {number for change in changes for number in change.groups}
    reason = f"no field of {type(config).__name__} says its width alone, so that a plain model keeps it"
    held = {
        site.name: reason
        for number, group in enumerate(groups)
        if number not in said and group.kind != BRANCHES
        for site in group.sites
    }
    spared = {site.name for number in said for site in groups[number].sites}
    repeats = tuple(tuple(site for n in change.groups for site in _names(groups[n])) for change in changes)
    counts = {site: change.counts for change in changes for n in change.groups for site in _names(groups[n])}
    return ClassLimits(
        {site: why for site, why in held.items() if site not in spared}, repeats=repeats,
        counts={site: own for site, own in counts.items() if own},
    )  # fmt: skip


def _names(group: Group) -> list[str]:
    return [site.name for site in group.sites]


def narrowed_config(
    config: PretrainedConfig, changes: Sequence[Change], coupling: Coupling, keep: Flags
) -> PretrainedConfig:
    """A copy of a configuration that says the widths of the kept units.

    Raises:
        NarrowError: groups that a field counts keep different numbers, or the class's own checks refuse the result.
    """
    config, groups = copy.deepcopy(config), coupling.prunable
    for change in changes:
        kept = {int(keep[groups[n].units.start : groups[n].units.stop].sum()) for n in change.groups}
        if len(kept) > 1:
            raise NarrowError(
                f"{', '.join(change.names)} of {type(config).__name__} counts the units of "
                f"{', '.join(groups[n].name for n in change.groups[:3])}, which keep different numbers "
                f"({', '.join(map(str, sorted(kept)))}): use equal_blocks=True"
            )
        if kept != {change.units}:
            change.written(config, kept.pop())
    if broken := _broken(config):
        raise NarrowError(f"{type(config).__name__} refuses the widths of the plan ({broken}): {OWN_CLASS}")
    return config


def built(model: PreTrainedModel, small: nn.Module, changes: Sequence[Change], planned: Planned) -> PreTrainedModel:
    """The class of `model` built by the configuration of a plan's widths, with the weights of `small`.

    Raises:
        NarrowError: groups that a field counts keep different numbers, the class has no place for a weight, or no field
            says the number of blocks.
    """
    config = narrowed_config(model.config, changes, planned.coupling, planned.keep)
    blocks = {own.block for own in removed_residuals(planned.coupling, planned.keep)}
    for path, removed in entries_of(blocks).items():
        config = _shorter(model, config, path, removed)
    with undisturbed():
        own: Any = type(model)(config)
        own.to(device_of(small))
    _fill(own, small, renaming(blocks))
    if hasattr(model, "generation_config"):
        own.generation_config = copy.deepcopy(model.generation_config)
    return own  # type: ignore[no-any-return]


def _shorter(model: PreTrainedModel, config: PretrainedConfig, path: str, removed: Sequence[int]) -> PretrainedConfig:
    """A configuration by which a class builds a list of modules without some entries, found by trying."""
    count = len(model.get_submodule(path))  # type: ignore[arg-type]
    kept = [number for number in range(count) if number not in removed]
    for where, _ in _inside(config):
        for name in depth_fields(_inner(config, where), path, count):
            tried = copy.deepcopy(config)
            shorten_config(_inner(tried, where), name, count, kept)
            shapes = _shapes(type(model), tried)
            if not isinstance(shapes, str) and _entries(shapes, path) == len(kept):
                return tried
    raise NarrowError(
        f"no field of {type(config).__name__} says the {count} entries of {path}, of which {len(removed)} are removed: "
        f"{_REMEDY}"
    )


def _entries(names: Iterable[str], path: str) -> int:
    """The number of entries of a list of modules that some parameters lie in."""
    return len({name.removeprefix(f"{path}.").partition(".")[0] for name in names if name.startswith(f"{path}.")})


def _fill(own: PreTrainedModel, small: nn.Module, rename: Callable[[str], str]) -> None:
    """Give a model the tensors of a graph, and its modes; `rename` gives the names that these have in the model."""
    have, given = named_tensors(own), named_tensors(small)
    needed = dict(small.named_parameters(remove_duplicate=False)).keys() | small.state_dict().keys()
    for there, name in ((rename(name), name) for name in given if name in needed):
        if there not in have or have[there].shape != given[name].shape:
            found = f"of shape {tuple(have[there].shape)}" if there in have else "missing"
            raise NarrowError(
                f"{there} has shape {tuple(given[name].shape)} after pruning, and is {found} in {type(own).__name__} "
                "built by its configuration: leave out plain=True, and use own_class=True"
            )
        have[there].data = have[there].data.to(given[name].dtype)
        put(own, there, given[name])
        have[there].requires_grad_(given[name].requires_grad)
    modes = {rename(name): module.training for name, module in small.named_modules()}
    for name, module in own.named_modules():
        module.training = modes.get(name, small.training)
