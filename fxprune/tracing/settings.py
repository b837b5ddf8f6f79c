"""How a graph was captured, as a plan keeps it, and the example that a plan describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.caller.example import example_bytes, from_json
from fxprune.caller.isolation import device_of
from fxprune.caller.meta import home_of
from fxprune.caller.typed_json import from_plain
from fxprune.errors import PlanError, first_line, is_out_of_memory
from fxprune.tracing.graph import ModelGraph, captured_of

FREE = 32 << 20  # bytes that the example of any model may have, beside as many as the model itself has
SETTINGS: dict[str, Any] = {
    "method": str, "leaves": tuple[str, ...], "concrete_args": Mapping[str, Any], "submodule": str,
    "inexact": bool, "head_dim": bool, "query_heads": bool, "blocks": str, "decisions": tuple[bool | int | float, ...],
}  # fmt: skip


def settings_of(graph: ModelGraph) -> dict[str, Any]:
    """How `graph` was captured, as a plan's JSON can hold it."""
    record = captured_of(graph)
    settings = {
        "leaves": list(record.leaves), "decisions": list(record.decisions), "concrete_args": record.concrete_args,
    }  # fmt: skip
    return {"method": record.method} | {name: value for name, value in settings.items() if value}


def check_settings(settings: Any, source: object) -> None:
    """Raise TypeError where settings are no mapping, or one has another type than it should.

    Raises PlanError where they name a way of capture that was removed; `source` is their file in the message.
    """
    from_plain(Mapping[str, Any], settings, "settings")  # type: ignore[type-abstract]
    for name, value in settings.items():
        from_plain(SETTINGS.get(name, Any), value, f"settings.{name}")
    if settings.get("method") == "export":
        raise PlanError(
            f'{source} was made with method="export", a way of capture that was removed: score the model again'
        )


def example_for(model: nn.Module, description: Any) -> Any:
    """An example of the described shapes for a model, where it can be.

    Raises PlanError where it is out of proportion to the model, or of a dtype that cannot be made.
    """
    try:
        size = example_bytes(description, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the plan's example cannot be made: {error}") from error
    limit = FREE + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > limit:
        raise PlanError(
            f"the plan's example has {size:,} bytes, more than the {limit:,} that are made for a "
            f"{type(model).__name__}: score smaller samples, or capture the model on an example of your own and give "
            "the graph in its place"
        )
    try:
        return from_json(description, device=home_of(device_of(model)))
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise PlanError(f"the plan's example cannot be made ({first_line(error)}): score the model again") from error
