"""From the original architecture and a header to the small model, with whatever weights."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.caller.isolation import isolated_copy
from fxprune.errors import ArtifactError, FxpruneError, FxpruneWarning, first_line, summary
from fxprune.pipeline import apply
from fxprune.planning.plan import Plan
from fxprune.saving.header import Builder, Header, Part
from fxprune.tracing.graph import history_of
from fxprune.tracing.part import part_of
from fxprune.version import __version__

_FAILURES = (FxpruneError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, OverflowError)


def rebuilt(model: nn.Module, header: Header, tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """`model`, which is not changed, after the header's plans; raises ArtifactError where these do not fit it."""
    small = _materialised(model, header, tensors)
    for part in header.parts:
        for content in part.plans:
            plan = plan_from(content, source)
            try:
                small = apply(small, plan)
            except _FAILURES as error:
                raise ArtifactError(
                    f"{source} was made from a {header.model}, and its plan does not fit the "
                    f"{type(model).__name__} that was given ({summary(error)}): pass model= of the architecture "
                    "that was pruned, built with the same arguments"
                ) from error
        _check_structure(small, plan.submodule, part, header, source)
    return small


def plan_from(content: Mapping[str, Any], source: object) -> Plan:
    """The plan that a header holds, its settings and the size of its example checked.

    Raises ArtifactError.
    """
    try:
        return Plan.from_dict(content, source)
    except FxpruneError as error:
        raise ArtifactError(f"{source} holds a plan that cannot be used: {first_line(error)}; get it anew") from error


def _materialised(model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with buffers from the file, where they kept their shape, and zeros in place of meta tensors.

    Buffers are taken over before anything is traced since a forward may index by them. Parameters are shared with
    `model`, or are zeros: they are only looked at for their shapes.
    """
    instead: dict[int, object] = {}
    made: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, held in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(held, Tensor):
                full = f"{path}.{name}" if path else name
                first = header.aliases.get(full, full)
                new = _stand_in(held, tensors.get(first))
                on_meta = held.device.type == "meta"  # going there unties tensors
                instead[id(held)] = made.setdefault(first, new) if on_meta else new
    return isolated_copy(model, instead)


def _stand_in(held: Tensor, saved: Tensor | None) -> Tensor:
    if isinstance(held, nn.Parameter):
        return held if held.device.type != "meta" else nn.Parameter(_zeros(held), requires_grad=held.requires_grad)
    if saved is not None and saved.shape == held.shape and saved.dtype == held.dtype:
        return saved.to("cpu" if held.device.type == "meta" else held.device, copy=True)
    return held.detach().clone() if held.device.type != "meta" else _zeros(held)


def _zeros(held: Tensor) -> Tensor:
    return torch.zeros(held.shape, dtype=held.dtype, device="cpu")


def _check_structure(small: nn.Module, path: str, part: Part, header: Header, source: object) -> None:
    """Compare the graph that was pruned with that of the file, node by node.

    Raises ArtifactError where they differ, and warns where torch or fxprune are of another version than the file's:
    these may spell one network in two ways.
    """
    graph: Any = part_of(small, path)
    now = history_of(graph).structure
    for index in range(max(len(now), len(part.structure))):
        old, new = (lines[index] if index < len(lines) else "no node" for lines in (part.structure, now))
        if old == new:
            continue
        said = f"{source} was made from a {header.model} in which node {index} is {old}, and in the model given {new}"
        if dict(header.versions) == versions():
            raise ArtifactError(
                f"{said}: pass model= of the architecture that was pruned, built with the same arguments"
            )
        made_by = ", ".join(f"{name} {version}" for name, version in header.versions.items())
        warnings.warn(f"{said}. It was made by {made_by}; compare the outputs", FxpruneWarning, stacklevel=4)
        return


def versions() -> dict[str, str]:
    """The versions that may decide how a model becomes a graph."""
    return {"fxprune": __version__, "torch": str(torch.__version__)}


def built(builder: Builder, source: object) -> nn.Module:
    """The model that a file's builder gives; imports and runs what the file names.

    Raises ArtifactError where that fails.
    """
    module, _, name = builder.target.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        model = made(**builder.kwargs)
    except Exception as error:
        raise ArtifactError(
            f"{source} names the builder {builder}, which fails ({type(error).__name__}: {first_line(error)}): "
            "pass model= instead"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{source} names the builder {builder}, which gives a {type(model).__name__}: pass model=")
    return model
