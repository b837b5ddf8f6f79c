"""Methods that can stand in for a module's forward, as exporters exchange them, and the sizes that only they read."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import nn

from fxprune.caller.isolation import isolated_copy
from fxprune.caller.source_lines import warn
from fxprune.errors import FxpruneError
from fxprune.planning.plan import Plan, coupling_of, kept_units
from fxprune.planning.planned import Planned
from fxprune.rewriting.named_sizes import Calls, set_sizes, solved, with_named_sizes
from fxprune.rewriting.proof import outputs_of
from fxprune.rewriting.rewrite import rewrite
from fxprune.tracing.agreement import TOLERANCES, relative_error
from fxprune.tracing.capture import capture_as
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, example_of


def mend_other_forwards(part: nn.Module, own: nn.Module, plan: Plan, graph: ModelGraph) -> None:
    """Set the integer attributes of a narrowed module that only its other forwards read, such as `forward_split`.

    Their names begin with "forward"; they take what the forward of their module takes, and give what it gives. `graph`
    was captured from `part`.

    Warns FxpruneWarning where such a method does not run in `own`, or does not give what the forward gives there.
    """
    for kind, name in dict.fromkeys((type(m), name) for m in part.modules() for name in _methods_with_sizes(m)):
        if _is_equal(part, kind, name, graph):
            with suppress(FxpruneError):
                set_sizes(own, solved(_uses(_exchanged(part, kind, name), plan, graph)))
            if not _is_equal(own, kind, name, graph):
                warn(
                    f"{kind.__name__}.{name} gave what {kind.__name__}.forward gives, and does not with the kept "
                    "layers: mend the sizes that it reads before it is called or exchanged for the forward"
                )


def _methods_with_sizes(module: nn.Module) -> list[str]:
    """The names of a module's other forwards that read integer attributes, whatever they give."""
    sizes = {name for name, value in vars(module).items() if type(value) is int}
    if not sizes or type(module).__module__.startswith("torch.nn"):
        return []
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    names = {name for kind in kinds for name in vars(kind) if name.lstrip("_").startswith("forward")} - {"forward"}
    methods = {name: inspect.getattr_static(module, name) for name in sorted(names)}
    forward = list(inspect.signature(type(module).forward).parameters)
    return [
        name
        for name, method in methods.items()
        if isinstance(method, FunctionType)
        and sizes & set(method.__code__.co_names)
        and list(inspect.signature(method).parameters) == forward
    ]


def _exchanged(module: nn.Module, kind: type[nn.Module], name: str) -> nn.Module:
    """A copy of a module in which a method takes the place of the forward of all modules of a class."""
    own = isolated_copy(module)
    for inner in own.modules():
        if type(inner) is kind:
            inner.forward = getattr(inner, name)
    return own


def _is_equal(module: nn.Module, kind: type[nn.Module], name: str, graph: ModelGraph) -> bool:
    """Whether a module runs with a method in place of the forward of a class, and gives the same outputs."""
    wanted, example = outputs_of(module, example_of(graph)), example_of(graph)
    try:
        found = outputs_of(_exchanged(module, kind, name), example)
    except Exception:  # noqa: BLE001 - whatever a method of the user's raises where it is no forward
        return False
    return relative_error(wanted, found) <= max((TOLERANCES[t.dtype] for t in wanted), default=0.0)


def _uses(other: nn.Module, plan: Plan, graph: ModelGraph) -> Any:
    """The sizes that a module reads by its exchanged forwards, with the numbers that a plan needs in their places."""
    example = example_of(graph)
    traced, named = (capture_as(plan.settings, m, example, prove=False) for m in (other, with_named_sizes(other)))
    traced.meta[RECORD] = replace(captured_of(traced), limits=replace(captured_of(graph).limits, even=()))
    coupling = coupling_of(traced, plan)
    return Calls(named, rewrite(*Planned(traced, coupling, kept_units(plan, coupling)))).uses()
