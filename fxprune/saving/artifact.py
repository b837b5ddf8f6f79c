"""Saving a pruned model as one file, and rebuilding it from the original architecture and that file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from fxprune.caller.arguments import CHECKS, check, is_keywords, wanted
from fxprune.caller.meta import need_numbers
from fxprune.caller.tensors import aliases_of, dtype_name, memory_format_of, named_tensors, put, without_place
from fxprune.errors import ArtifactError, NarrowError, a_kind
from fxprune.reporting.report import Pruned, note_in_class, pruned_of
from fxprune.rewriting.own_class import narrow
from fxprune.saving.container import read_artifact, sha256_of, write_artifact
from fxprune.saving.header import Builder, Header, Part, TensorRecord
from fxprune.saving.rebuild import build_model, plan_from, rebuilt, versions
from fxprune.scoring.scores import Scores
from fxprune.tracing.graph import RECORD, history_of
from fxprune.tracing.part import part_of

__all__ = ["load", "save"]

_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
CHECKS["builder"] = wanted(
    lambda text: isinstance(text, str) and bool(_TARGET.fullmatch(text)),
    'write "package.module:callable"',
    ArtifactError,
)
CHECKS["builder_kwargs"] = wanted(is_keywords, "it is a dict of arguments of the builder", ArtifactError)


def save(
    small: nn.Module,
    path: str | PathLike[str],
    *,
    scores: Scores | None = None,
    builder: str | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model as one safetensors file: its weights, the plan, the report, and its origin.

    The file appears whole or not at all. Nothing in it is code, and nothing is pickled.

    Args:
        small: from `compress`, `apply`, `finetune` or `load`; with a plan for a part, the whole model.
        path: the file; an old one is replaced.
        scores: those that the plan came from, to record how they were made; `compress` records that itself.
        builder: "package.module:callable" that gives a model of the original architecture, for `build=True` of `load`.
        builder_kwargs: its arguments, which JSON has to hold.

    Raises:
        ArtifactError: `small` has no plan, cannot be described, or the file cannot be written.
    """
    check(save, locals())
    if builder is None and builder_kwargs:
        raise ArtifactError("builder_kwargs are given without builder=: name the callable that they are for")
    parts = _parts(small, scores)
    need_numbers(small, "save", ArtifactError)
    _check_states(small)
    held = named_tensors(small)
    aliases = aliases_of(held)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items() if name not in aliases}
    header = Header(
        parts[0].report.model.removesuffix(f".{parts[0].path}"), versions(), parts,
        {name: TensorRecord(tuple(t.shape), dtype_name(t), sha256_of(t), memory_format_of(held[name]))
         for name, t in own.items()},
        aliases,
        tuple(name for name, p in small.named_parameters() if not p.requires_grad),
        small.training,
        tuple(name for name, m in small.named_modules(remove_duplicate=False) if m.training != small.training),
        Builder(builder, dict(builder_kwargs or {})) if builder else None,
    )  # fmt: skip
    write_artifact(path, header, _without_views(own))


def load(
    path: str | PathLike[str], model: nn.Module | None = None, *, build: bool = False, own_class: bool = False
) -> nn.Module:
    """The pruned model that `save` wrote, made again from a model of the original architecture.

    The plan is applied to `model`, then the weights are loaded; names, shapes, dtypes and shared tensors have to be
    those of the file. The result is on the model's device (on the CPU where `model` is on the meta device), and in the
    training mode in which it was saved; `report` returns the saved report.

    Args:
        path: the file. Every checksum in it is compared, and nothing in it is run.
        model: of the architecture that was pruned, with any weights; it is not changed. It may be on the meta device.
        build: import and call the builder that the file names to get the model. Only for files that you trust.
        own_class: return a model of the class of `model`, see `narrow`, in place of a graph.

    Raises:
        ArtifactError: the file cannot be read, was altered, or is not for this model; or no model is given.
        NarrowError: with `own_class`, where the class does not run narrower.
    """
    check(load, locals())
    if model is not None and build:
        raise ArtifactError("model= and build=True are both given: leave one out")
    header, tensors = read_artifact(path)
    plans = [[plan_from(content, path) for content in part.plans] for part in header.parts]
    if model is None:
        model = _model_of_builder(header, path, build=build)
    small = rebuilt(model, header, plans, tensors, path)
    _check_tensors(small, header, path)
    for name, tensor in tensors.items():
        put(small, name, tensor)
    _set_states(small, header)
    return _in_own_class(small, model, header) if own_class else small


def _in_own_class(small: nn.Module, model: nn.Module, header: Header) -> nn.Module:
    """A loaded model in the class of the original, with its records and modes."""
    own = model
    for part in header.parts:
        graph = part_of(small, part.path)
        plan, *others = history_of(graph).plans
        if others:
            raise NarrowError(f"{header.model} was pruned {len(others) + 1} times one after another: load the graph")
        own = narrow(own, plan, weights=small)
        note_in_class(part_of(own, part.path), graph)
    others_modes = {name: module.training for name, module in small.named_modules(remove_duplicate=False)}
    for name, module in own.named_modules(remove_duplicate=False):
        module.training = others_modes.get(name, header.training)
    return own


def _parts(small: nn.Module, scores: Scores | None) -> tuple[Part, ...]:
    """The records of the pruned graphs in a model. Raises ArtifactError where the model cannot be rebuilt from them."""
    found = [(name, m) for name, m in small.named_modules() if pruned_of(m)]
    if not found:
        raise ArtifactError(
            f"{type(small).__name__} has no plan: save what fxprune.compress, apply, finetune or load gave"
        )
    parts = []
    for name, graph in found:
        record: Pruned = graph.meta[RECORD]
        path, history = record.plan.submodule, record.history
        if path != name:
            raise ArtifactError(
                f"the pruned graph stands at {name!r} in {type(small).__name__}, and its plan is for {path!r}: "
                "save the model as compress or apply gave it, without a wrapper around it"
            )
        outer = [other for other, _ in found if other != name and (not other or name.startswith(f"{other}."))]
        if outer:
            raise ArtifactError(
                f"{name or 'the model'} was pruned inside {outer[0] or 'the model'}, which was pruned too: the "
                "order is not kept; save the plans one by one"
            )
        plans = tuple(plan.to_dict() for plan in history.plans)
        for plan in plans:
            plan_from(plan, "the model")
        about = dict(scores.about) if scores else record.scores
        parts.append(Part(plans, record.report, history.structure, history.biases, about))
    return tuple(parts)


def _check_states(small: nn.Module) -> None:
    """Raise where a module keeps a state that is no tensor."""
    for name, module in small.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ArtifactError(f"{name or 'the model'} is {a_kind(module)} with an extra state: it is not kept")


def _without_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies of those that are views into the storage of another."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = place not in seen and tensor.untyped_storage().nbytes() == tensor.nbytes
        own[name] = tensor if whole else tensor.clone()
        seen.add(place)
    return own


def _model_of_builder(header: Header, path: Any, *, build: bool) -> nn.Module:
    """The model of a file's builder, if `build`. Raises ArtifactError, which describes the needed model."""
    if build and header.builder is not None:
        return build_model(header.builder, path)
    where = " and ".join(part.path for part in header.parts if part.path)
    text = f"{path} holds a pruned {header.model}{f' (its {where})' if where else ''}, made by {header.made_by}: "
    text += "pass model=, with any weights, of the architecture that was pruned"
    if header.builder is not None:
        raise ArtifactError(f"{text}; or build=True to import and call {header.builder}, if you trust the file")
    raise ArtifactError(text + ("; the file names no builder for build=True" if build else ""))


_REMEDY = "pass model= of the architecture that was pruned, built with the same arguments and in the same dtype"


def _check_tensors(small: nn.Module, header: Header, path: Any) -> None:
    """Raise where the rebuilt model has other tensors than the file, except biases that compensation created."""
    have = named_tensors(small)
    biases = {f"{part.path}.{name}".lstrip(".") for part in header.parts for name in part.biases}
    new = [name for name in (*header.tensors, *header.aliases) if name not in have]
    missing = [name for name in new if name not in biases] or without_place(small, new)
    if missing:
        raise ArtifactError(f"{path} holds {missing[0]}, which the rebuilt {header.model} does not have: {_REMEDY}")
    first = aliases_of(have)
    for name, tensor in have.items():
        if name not in header.tensors and name not in header.aliases:
            raise ArtifactError(f"the rebuilt {header.model} has {name}, which {path} does not hold: {_REMEDY}")
        there, here = header.aliases.get(name), first.get(name)
        record = header.tensors.get(there or name)
        said = "nothing" if record is None else f"{record.shape} {record.dtype}"
        found = f"{tuple(tensor.shape)} {dtype_name(tensor)}"
        if said != found:
            raise ArtifactError(f"{name} is {said} in {path}, and {found} in the rebuilt {header.model}: {_REMEDY}")
        if there != here:
            raise ArtifactError(
                f"{name} is {f'one tensor with {there}' if there else 'a tensor of its own'} in {path}, and "
                f"{f'one with {here}' if here else 'one of its own'} in the model that was given: tie them as they were"
            )


def _set_states(small: nn.Module, header: Header) -> None:
    """Restore the training modes, `requires_grad` of the parameters, and the records."""
    others, frozen = set(header.others), set(header.frozen)
    for name, module in small.named_modules(remove_duplicate=False):
        module.training = header.training != (name in others)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for part in header.parts:
        graph: Any = part_of(small, part.path)
        record: Pruned = graph.meta[RECORD]
        history = replace(record.history, biases=part.biases)
        graph.meta[RECORD] = replace(record, report=part.report, history=history, scores=part.scores)
