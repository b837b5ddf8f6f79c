"""What an artefact says of the model whose weights it holds, as dataclasses that JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxprune.caller.typed_json import from_plain
from fxprune.errors import ArtifactError, PlanError
from fxprune.reporting.report import Report

FORMAT = 1
LARGEST = 64 << 20  # bytes of the header; that of a network of thousands of layers is a tenth of it


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor: shape, dtype, memory format where it is not plain, and the SHA-256 of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    memory_format: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One pruned graph, the model or a part of it.

    `plans` lead to it one after the other, as `Plan.to_dict` gives them; `structure` describes the graph that the
    first of them starts from, a line a node; `biases` are the parameters that compensation created, by their names in
    the part; `scores` says how scores were made, where that is known.
    """

    plans: tuple[Mapping[str, Any], ...]
    report: Report
    structure: tuple[str, ...]
    biases: tuple[str, ...] = ()
    scores: Mapping[str, Any] | None = None

    @property
    def path(self) -> str:
        """Where the part stands in the model; empty where it is the whole."""
        return str(self.plans[-1].get("settings", {}).get("submodule", ""))


@dataclass(frozen=True, slots=True)
class Builder:
    """A callable that gives a model of the original architecture, as text: "package.module:name", and its arguments."""

    target: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.target}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"


@dataclass(frozen=True, slots=True)
class Header:
    """All that an artefact holds but the weights.

    `aliases` are further names of tensors; `frozen` those parameters that take no gradients; `training` is the mode of
    the model and `others` names the modules that are in the other one.
    """

    model: str
    versions: Mapping[str, str]
    parts: tuple[Part, ...]
    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str]
    frozen: tuple[str, ...]
    training: bool
    others: tuple[str, ...]
    builder: Builder | None = None

    def to_text(self) -> str:
        """The header as JSON."""
        try:
            text = json.dumps(asdict(self), separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"the notes of {self.model} cannot be written as JSON ({error}): give builder_kwargs of numbers, "
                "strings, lists and dicts"
            ) from error
        if len(text) > LARGEST:
            raise ArtifactError(f"the header of {self.model} has {len(text):,} bytes, more than {LARGEST:,}")
        return text

    @classmethod
    def of_text(cls, text: str, source: object) -> Header:
        """The header that `to_text` gave. Raises ArtifactError where it is none."""
        try:
            header = from_plain(cls, json.loads(text))
            if not header.parts or not all(part.plans for part in header.parts):
                raise ValueError("it has no plan")
            return header
        except (ValueError, TypeError, RecursionError, PlanError) as error:
            raise ArtifactError(
                f"{source} is not a model that fxprune.save wrote: its header cannot be read ({error}); get it anew"
            ) from error
