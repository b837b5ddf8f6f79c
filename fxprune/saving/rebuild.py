"""From the original architecture and a header to the small model, its weights not yet loaded."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.caller.isolation import isolated_copy
from fxprune.caller.source_lines import warn
from fxprune.caller.tensors import held_tensors
from fxprune.errors import ArtifactError, FxpruneError, a, a_kind, error_text, first_line, summary
from fxprune.pipeline import apply
from fxprune.planning.plan import Plan
from fxprune.saving.header import Builder, Header, Part
from fxprune.tracing.graph import history_of
from fxprune.tracing.part import part_of
from fxprune.version import __version__

_REMEDY = (
    "pass model= of the architecture that was pruned, built with the same arguments, and with those of its forward "
    "hooks that compute"
)
_FAILURES = (FxpruneError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, OverflowError)


def rebuilt(
    model: nn.Module, header: Header, plans: Sequence[Sequence[Plan]], tensors: Mapping[str, Tensor], source: object
) -> nn.Module:
    """`model`, which is not changed, after the plans of each part. Raises ArtifactError where they do not fit it."""
    small = _materialised(model, header, tensors)
    for part, applied in zip(header.parts, plans, strict=True):
        for plan in applied:
            try:
                small = apply(small, plan)
            except _FAILURES as error:
                raise ArtifactError(
                    f"{source} was made from {a(header.model)}, and its plan does not fit the "
                    f"{type(model).__name__} that was given ({summary(error)}): {_REMEDY}"
                ) from error
        _check_structure(small, part, header, source)
    return small


def plan_from(content: Mapping[str, Any], source: object) -> Plan:
    """The plan that a header holds, checked. Raises ArtifactError."""
    try:
        return Plan.from_dict(content, source)
    except FxpruneError as error:
        raise ArtifactError(f"{source} holds a plan that cannot be used: {first_line(error)}; get it anew") from error


def _materialised(model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with buffers from the file, where they kept their shape, and zeros in place of meta tensors.

    Buffers are set before tracing because a forward may index by them. Parameters, of which only the shapes matter,
    are shared with `model`, or are zeros.
    """
    instead: dict[int, object] = {}
    made: dict[str, Tensor] = {}
    for name, _, held in held_tensors(model):
        first = header.aliases.get(name, name)
        new = _stand_in(held, tensors.get(first))
        on_meta = held.device.type == "meta"  # going there unties tensors
        instead[id(held)] = made.setdefault(first, new) if on_meta else new
    return isolated_copy(model, instead)


def _stand_in(held: Tensor, saved: Tensor | None) -> Tensor:
    on_meta = held.device.type == "meta"
    if isinstance(held, nn.Parameter):
        return nn.Parameter(_zeros(held), requires_grad=held.requires_grad) if on_meta else held
    if saved is not None and saved.shape == held.shape and saved.dtype == held.dtype:
        return saved.to("cpu" if on_meta else held.device, copy=True)
    return _zeros(held) if on_meta else held.detach().clone()


def _zeros(held: Tensor) -> Tensor:
    return torch.zeros(held.shape, dtype=held.dtype, device="cpu")


def _check_structure(small: nn.Module, part: Part, header: Header, source: object) -> None:
    """Compare the graph that was pruned with that of the file, node by node.

    Raises ArtifactError where they differ; warns where the versions of torch or fxprune differ too, because these may
    spell one network in two ways.
    """
    now = history_of(part_of(small, part.path)).structure
    if now == part.structure:
        return
    pairs = enumerate(zip_longest(part.structure, now, fillvalue="no node"))
    index, (old, new) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    text = f"{source} was made from {a(header.model)} in which node {index} is {old}, and in the model given {new}"
    if dict(header.versions) == versions():
        raise ArtifactError(f"{text}: {_REMEDY}")
    warn(f"{text}. It was made by {header.made_by}; compare the outputs")


def versions() -> dict[str, str]:
    """The versions on which the graph of a model may depend."""
    return {"fxprune": __version__, "torch": str(torch.__version__)}


def build_model(builder: Builder, source: object) -> nn.Module:
    """The model of a file's builder, which is imported and called. Raises ArtifactError where that fails."""
    try:
        model = pkgutil.resolve_name(builder.target)(**builder.kwargs)
    except Exception as error:
        raise ArtifactError(
            f"{source} names the builder {builder}, which fails ({error_text(error)}): pass model= instead"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{source} names the builder {builder}, which gives {a_kind(model)}: pass model=")
    return model
