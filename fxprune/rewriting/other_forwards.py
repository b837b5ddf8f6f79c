"""Methods that can stand in for a module's forward, as exporters exchange them, and the sizes that only they read."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_call, as_fields, copied
from fxprune.caller.isolation import applied, isolated_copy, undisturbed
from fxprune.caller.source_lines import warn
from fxprune.errors import FxpruneError, FxpruneWarning, is_out_of_memory
from fxprune.planning.plan import Plan, coupling_of, kept_units
from fxprune.planning.planned import Planned
from fxprune.rewriting.named_sizes import Calls, Use, set_sizes, solved, with_named_sizes
from fxprune.rewriting.rewrite import rewrite
from fxprune.tracing.agreement import agree
from fxprune.tracing.capture import capture_as
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, example_of


def mend_other_forwards(part: nn.Module, own: nn.Module, plan: Plan, graph: ModelGraph) -> nn.Module:
    """A narrowed module in which integer attributes that only its other forwards read, such as `forward_split`, fit.

    Their names begin with "forward"; they take what the forward of their module takes, and give what it gives. An
    attribute that the forward reads, too, in eval or training mode, stays as it is. `graph` was captured from `part`.

    Warns FxpruneWarning where such a method does not run in the result, or does not give what the forward gives there.
    """
    example, found = example_of(graph), dict.fromkeys((type(m), name) for m in part.modules() for name in _others(m))
    equal = [(kind, name) for kind, name in found if _is_equal(part, kind, name, example)]
    for kind, name in equal:
        with suppress(FxpruneError):
            mended = isolated_copy(own)
            set_sizes(mended, solved(_uses(_exchanged(part, kind, name), plan, graph)))
            if all(agree(*(_output(m, example, training) for m in (own, mended))) for training in (False, True)):
                own = mended
    missed = [f"{kind.__name__}.{name}" for kind, name in equal if not _is_equal(own, kind, name, example)]
    if missed:
        warn(
            f"{', '.join(missed)} gave what the forward gives, and with the kept layers no more: mend the sizes that "
            "it reads before it is called or exchanged for the forward"
        )
    return own


def _others(module: nn.Module) -> list[str]:
    """The names of a module's other forwards that read integer attributes, whatever they give."""
    sizes = {name for name, value in vars(module).items() if type(value) is int}
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    names = sorted({name for kind in kinds for name in vars(kind) if name.lstrip("_").startswith("forward")})
    methods = {name: [inspect.unwrap(vars(kind)[name]) for kind in kinds if name in vars(kind)] for name in names}
    forward = _parameters(inspect.unwrap(type(module).forward))
    return [
        name
        for name, chain in methods.items()
        if name != "forward" and not type(module).__module__.startswith("torch.nn")
        and _parameters(chain[0]) == forward is not None
        and any(sizes & _names_in(method.__code__) for method in chain if isinstance(method, FunctionType))
    ]  # fmt: skip


def _parameters(method: Any) -> list[str] | None:
    """The names of a function's parameters; None for what is no function of Python."""
    return list(inspect.signature(method).parameters) if isinstance(method, FunctionType) else None


def _names_in(code: CodeType) -> set[str]:
    """The names of attributes in a function and those inside of it."""
    inside = (value for value in code.co_consts if isinstance(value, CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


def _exchanged(module: nn.Module, kind: type[nn.Module], name: str) -> nn.Module:
    """A copy of a module in which a method takes the place of the forward of all modules of a class."""
    own = isolated_copy(module)
    for inner in own.modules():
        if type(inner) is kind:
            inner.forward = getattr(inner, name)
    return own


def _is_equal(module: nn.Module, kind: type[nn.Module], name: str, example: Any) -> bool:
    """Whether a module runs with a method in place of the forward of a class, and gives the same outputs."""
    found = _output(_exchanged(module, kind, name), example)
    return found is not None and agree(_output(module, example), found)


def _output(module: nn.Module, example: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002
    """The output of a copy of a module in eval or training mode; None where it does not run."""
    args, kwargs = as_call(copied(example))
    try:
        with undisturbed(), torch.no_grad():
            torch.manual_seed(0)
            output = applied(isolated_copy(module), "train", training)(*args, **kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    return pytree.tree_map_only(Tensor, Tensor.detach, as_fields(output))


def _uses(other: nn.Module, plan: Plan, graph: ModelGraph) -> list[Use]:
    """The sizes that a module reads by its exchanged forwards, with the numbers that a plan needs in their places."""
    example = example_of(graph)
    with warnings.catch_warnings():  # no graph of it is given to the caller
        warnings.simplefilter("ignore", FxpruneWarning)
        traced, named = (capture_as(plan.settings, m, example, prove=False) for m in (other, with_named_sizes(other)))
    traced.meta[RECORD] = replace(captured_of(traced), limits=replace(captured_of(graph).limits, even=()))
    coupling = coupling_of(traced, plan)
    return Calls(named, rewrite(*Planned(traced, coupling, kept_units(plan, coupling)))).uses()
