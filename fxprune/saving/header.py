"""The header of an artefact: all but the weights, as dataclasses that JSON can hold."""

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

    `plans` were applied in order, each as `Plan.to_dict` gives it; `structure` describes the graph before the first of
    them, one line per node; `biases` names the parameters that compensation created, within the part; `scores` says
    how the scores were made, where that is known.
    """

    plans: tuple[Mapping[str, Any], ...]
    report: Report
    structure: tuple[str, ...]
    biases: tuple[str, ...] = ()
    scores: Mapping[str, Any] | None = None

    @property
    def path(self) -> str:
        """The path of the part in the model; empty for the whole model."""
        return str(self.plans[-1].get("settings", {}).get("submodule", ""))


@dataclass(frozen=True, slots=True)
class Builder:
    """A callable that returns a model of the original architecture: "package.module:name", and its arguments."""

    target: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.target}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in an artefact except the weights.

    `aliases` maps further names of tensors to the first; `frozen` names the parameters without gradients; `training`
    is the mode of the model, and `others` names the modules in the other mode.
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

    @property
    def made_by(self) -> str:
        """The versions of fxprune and torch that wrote the file, as text."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    def to_text(self) -> str:
        """The header as JSON."""
        try:
            text = json.dumps(asdict(self), separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"the header of {self.model} cannot be written as JSON ({error}): give builder_kwargs of numbers, "
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
