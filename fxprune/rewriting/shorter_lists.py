"""Blocks that are removed whole from a model's own class: entries of lists of modules, which get shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fxprune.coupling.branch_units import WHOLE
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned
from fxprune.rewriting.removed_branches import removed_residuals

DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")  # by which a block knows its place in the list
_OF_NUMBERS = ("mlp_only_layers",)  # lists of such places in a configuration

Lists = Mapping[str, Sequence[int]]  # the path of a list, and the entries of it that are removed


def removed_blocks(plan: Plan) -> tuple[str, ...]:
    """The paths of the blocks that a plan removes."""
    return plan.removed_branches if plan.settings.get("blocks") == WHOLE else ()


def removed_entries(planned: Planned) -> Lists | None:
    """The entries of lists that are removed; None where a residual branch is removed that is no whole block."""
    removed = removed_residuals(planned.coupling, planned.keep)
    return None if any(not own.block for own in removed) else entries_of(own.block for own in removed)


def entries_of(blocks: Iterable[str]) -> dict[str, list[int]]:
    """Blocks by the lists that hold them.

    >>> entries_of(["model.layers.3", "model.layers.1", "model.layers.3"])
    {'model.layers': [1, 3]}
    """
    found: dict[str, set[int]] = {}
    for block in blocks:
        path, _, number = block.rpartition(".")
        found.setdefault(path, set()).add(int(number))
    return {path: sorted(numbers) for path, numbers in found.items()}


def renaming(blocks: Iterable[str]) -> Callable[[str], str]:
    """The function from a name in the model to that in the model without some blocks.

    >>> renaming(["layers.1"])("layers.2.mlp.weight"), renaming(["layers.1"])("layers.0.mlp.weight")
    ('layers.1.mlp.weight', 'layers.0.mlp.weight')
    """
    lists = entries_of(blocks)

    def rename(name: str) -> str:
        for path, numbers in lists.items():
            start = f"{path}." if path else ""
            number, dot, rest = name.removeprefix(start).partition(".")
            if name.startswith(start) and number.isdigit():
                name = f"{start}{int(number) - sum(n < int(number) for n in numbers)}{dot}{rest}"
        return name

    return rename


def shorten(own: nn.Module, lists: Lists) -> None:
    """Remove entries of lists of modules from a model, and from what its configurations say of each."""
    for path, removed in lists.items():
        entries: Any = own.get_submodule(path)
        kept = [number for number in range(len(entries)) if number not in removed]
        for config in {id(c): c for m in own.modules() if (c := vars(m).get("config")) is not None}.values():
            for name in depth_fields(config, path, len(entries))[:1]:
                shorten_config(config, name, len(entries), kept)
        for number in reversed(removed):
            del entries[number]
        for place, number in enumerate(kept):
            for module in entries[place].modules():
                own_numbers = [name for name in _NUMBERS if vars(module).get(name) == number]
                vars(module).update(dict.fromkeys(own_numbers, place))


def shorten_config(config: Any, name: str, count: int, kept: Sequence[int]) -> None:
    """Let a configuration say that of `count` blocks some are kept: in the field `name`, and in all lists of theirs."""
    setattr(config, name, len(kept))
    for other in _OF_NUMBERS:
        if isinstance(value := vars(config).get(other), (list, tuple)):
            setattr(config, other, type(value)(kept.index(number) for number in value if number in kept))
    for other, value in dict(vars(config)).items():
        if isinstance(value, (list, tuple)) and len(value) == count and other not in _OF_NUMBERS:
            setattr(config, other, type(value)(value[number] for number in kept))


def depth_fields(config: Any, path: str, count: int) -> list[str]:
    """The fields of a configuration that may say the length `count` of the list at a path, likely ones first."""
    sides = [side for side in ("encoder", "decoder") if side in path.split(".")]
    others = [side for side in ("encoder", "decoder") if sides and side not in sides]
    names = [name for name in DEPTHS if getattr(config, name, None) == count and not any(s in name for s in others)]
    return sorted(names, key=lambda name: not any(side in name for side in sides))
