"""Models of diffusers: folders that hold a pruned one, and that make it again in its own class."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from fxprune.caller.files import folder as folder_at
from fxprune.caller.files import made_folder, regular, replacing
from fxprune.caller.isolation import dtype_of, undisturbed
from fxprune.errors import ArtifactError, a, error_text
from fxprune.saving.artifact import load, save

__all__ = ["from_pretrained", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "fxprune.safetensors"


def save_pretrained(small: nn.Module, folder: str | PathLike[str], model: ModelMixin) -> None:
    """Write a pruned model of diffusers into a folder: its configuration as config.json, the rest as `fxprune.save`.

    Args:
        small: from `fxprune.compress`, a graph or in its own class; later changes of it, such as fine-tuning, are kept.
        folder: it is made where it is missing.
        model: the model that `small` was made from, for its class and configuration.

    Raises:
        ArtifactError: the class is none of diffusers' own, `small` has no plan, or a file cannot be written.
    """
    name = type(model).__name__
    if not isinstance(model, ModelMixin) or getattr(diffusers, name, None) is not type(model):
        raise ArtifactError(
            f"{name} is no class of diffusers, so its name in {CONFIG} would not lead to it: use fxprune.save, and "
            f"fxprune.load with model= {a(name)}"
        )
    place = made_folder(folder, ArtifactError)
    save(small, place / WEIGHTS)
    described: Any = json.loads(model.to_json_string())  # type: ignore[attr-defined]
    how = {"dtype": str(dtype_of(small)).removeprefix("torch.")}
    with replacing(place / CONFIG, ArtifactError) as file:
        file.write_text(json.dumps(described | {"fxprune": how}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def from_pretrained(folder: str | PathLike[str], *, own_class: bool = True) -> nn.Module:
    """The model that `save_pretrained` wrote: its architecture from the configuration, then `fxprune.load`.

    Nothing is downloaded, and only the code of diffusers and fxprune runs. A pipeline takes the result as a component:
    `DiffusionPipeline.from_pretrained(path, unet=from_pretrained(folder))`.

    Args:
        folder: with config.json and fxprune.safetensors.
        own_class: return the class that config.json names; otherwise a graph.

    Raises:
        ArtifactError: a file is missing or was altered, or names a class that diffusers does not have.
        NarrowError: with `own_class`, where the class does not run narrower: it was saved as a graph.
    """
    place = folder_at(folder, ArtifactError, "read")
    path = place / CONFIG
    regular(path, ArtifactError, "read")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        name, dtype = str(described["_class_name"]), getattr(torch, described.pop("fxprune")["dtype"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error_text(error)}): name a folder that save_pretrained wrote"
        ) from error
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ArtifactError(f"{path} names the class {name}, which diffusers does not have: update it")
    try:
        with undisturbed():
            model = kind.from_config(described).to(dtype)  # type: ignore[attr-defined]
    except Exception as error:
        raise ArtifactError(
            f"{path} gives no {name} ({error_text(error)}): was it altered, or written by another version of diffusers?"
        ) from error
    return load(place / WEIGHTS, model, own_class=own_class)
