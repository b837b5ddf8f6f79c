"""Hugging Face transformers: pruning a model by the loss of its own class, and folders that hold a pruned model."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from fxprune import paths
from fxprune.caller.batches import Unpack, batch_to_device, batches, split
from fxprune.caller.example import as_call
from fxprune.caller.files import replacing
from fxprune.caller.isolation import device_of, evaluating, isolated_copy, undisturbed
from fxprune.errors import ArtifactError, CalibrationError, FxpruneError, first_line
from fxprune.pipeline import compress
from fxprune.reporting.report import pruned_of
from fxprune.saving.artifact import load, save
from fxprune.saving.own_class import narrow
from fxprune.scoring.objective import Loss

__all__ = ["compress_pretrained", "from_pretrained", "narrow_pretrained", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "fxprune.safetensors"
_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForCausalLM")
_SPANS = ("start_positions", "end_positions")
_TOLERANCE = 1e-3  # of the two losses; what is looked for is another formula, not another rounding


def compress_pretrained(
    model: PreTrainedModel,
    loader: Iterable[Any],
    alpha: float | None = None,
    *,
    loss: Loss | None = None,
    unpack: Unpack | None = None,
    **options: Any,
) -> nn.Module:
    """`fxprune.compress` for a model of transformers, with `unpack` and `loss` chosen for its class.

    Batches are those of a Trainer: dicts with the labels among them; columns that the forward does not take are left
    out. The loss is the one that the class computes when it is given labels: `loss_function` of the model, or one of
    transformers for a usual task, whichever agrees with the class on the first batch. The model runs without its cache
    of keys and values.

    Args:
        model: with a head, in any mode and on any device; it comes back untouched.
        loader: re-iterable batches of dicts, or of pairs (inputs, labels).
        alpha: the tolerance, see `compress`; a budget may stand in its place.
        loss, unpack: those of `compress`, in place of the ones that are chosen here.
        options: all others of `compress`.

    Returns:
        What `compress` gives: a graph with the forward's arguments, but for labels, and the outputs of the class
        without a loss. `narrow_pretrained` makes the class of it.

    Raises:
        CalibrationError: the batches have no labels, or the loss of the class is not a function of its outputs and
            labels that is known here.
        FxpruneError: one of its children, from the stage that failed.
    """
    own = _without_cache(model)
    unpack = unpack or partial(_columns, *_arguments(type(model)))
    loss = loss or _loss_of_class(own, loader, unpack)
    return compress(own, loader, alpha, loss=loss, unpack=unpack, **options)


def narrow_pretrained(small: nn.Module, model: PreTrainedModel) -> PreTrainedModel:
    """What `compress_pretrained` made of `model`, in the class of `model`: with a loss, and for a Trainer.

    Args:
        small: the graph; its weights and modes are taken.
        model: the model that it was made from, or one of its architecture.

    Raises:
        NarrowError: the class does not run with narrower layers, see `fxprune.narrow`.
    """
    own = narrow(_without_cache(model), _plan_of(small), weights=small)
    for mine, theirs in zip(_configs(own), _configs(model), strict=True):
        mine.update({"use_cache": theirs.use_cache} if "use_cache" in theirs.to_dict() else {})
    modes = {name: module.training for name, module in small.named_modules()}
    for name, module in own.named_modules():
        module.training = modes.get(name, small.training)
    return own  # type: ignore[return-value]


def save_pretrained(small: nn.Module, folder: str | PathLike[str], model: PreTrainedModel) -> None:
    """Write a pruned model into a folder: the configuration as config.json, and all else as `fxprune.save` does.

    Args:
        small: from `compress_pretrained`; what else was done with it, such as fine-tuning, is kept.
        folder: it is made where it is missing.
        model: the model that `small` was made from, for its class and configuration.

    Raises:
        ArtifactError: the class is none of transformers' own, `small` has no plan, or a file cannot be written.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ArtifactError(
            f"{name} is no class of transformers, so its name in {CONFIG} would not lead to it: use fxprune.save, and "
            f"fxprune.load with model= a {name}"
        )
    place = paths.made_folder(folder, ArtifactError)
    save(small, place / WEIGHTS)
    described = json.loads(model.config.to_json_string())
    how = {"attn_implementation": model.config._attn_implementation, "dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(place / CONFIG, ArtifactError) as file:
        text = json.dumps(described | {"architectures": [name], "fxprune": how}, indent=2, sort_keys=True)
        file.write_text(text + "\n", encoding="utf-8")


def from_pretrained(folder: str | PathLike[str], *, own_class: bool = False) -> nn.Module:
    """The model that `save_pretrained` wrote: its architecture from the configuration, then `fxprune.load`.

    Nothing is downloaded, and no code is run but that of transformers and fxprune.

    Args:
        folder: with config.json and fxprune.safetensors.
        own_class: give the class that config.json names, see `narrow_pretrained`, and not a graph.

    Raises:
        ArtifactError: a file is missing or was altered, or names a class that transformers does not have.
        NarrowError: with `own_class`, where that cannot be.
    """
    place = paths.folder(folder, ArtifactError, "read")
    model = _architecture(place, "cpu" if own_class else "meta")
    small = load(place / WEIGHTS, _without_cache(model))
    return narrow_pretrained(small, model) if own_class else small


def _without_cache(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that neither returns nor takes keys and values of earlier words."""
    if not isinstance(model, PreTrainedModel):
        raise FxpruneError(f"{type(model).__name__} is no PreTrainedModel of transformers: use fxprune.compress")
    own: Any = isolated_copy(model)
    for config in _configs(own):
        config.update({"use_cache": False} if "use_cache" in config.to_dict() else {})
    return own  # type: ignore[no-any-return]


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """The configurations that the modules of a model hold, each once."""
    held = [vars(module).get("config") for module in model.modules()]
    return list({id(config): config for config in held if isinstance(config, PretrainedConfig)}.values())


def _arguments(kind: type[PreTrainedModel]) -> tuple[list[str], list[str]]:
    """The names of the forward's arguments that are inputs, and of those that are labels."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    labels = [name for name in names if "label" in name or name in _SPANS]
    return [name for name in names if name not in labels], labels


def _columns(inputs: list[str], labels: list[str], batch: Any) -> tuple[Any, Any]:
    """The inputs and the labels of a batch: the one column of labels, or a dict of several, or None."""
    if not isinstance(batch, Mapping):
        return split(batch)
    given = {name: batch[name] for name in batch if batch[name] is not None}
    found = {name: given[name] for name in labels if name in given}
    targets = next(iter(found.values())) if list(found) == ["labels"] else found or None
    return {name: given[name] for name in inputs if name in given}, targets


def _loss_of_class(model: PreTrainedModel, loader: Iterable[Any], unpack: Unpack) -> Loss:
    """The loss that a class computes, as a function of its outputs and labels; compared with its own on one batch."""
    inputs, targets = batch_to_device(next(iter(batches(loader, unpack))), device_of(model))
    if targets is None:
        raise CalibrationError(
            f"the batches have no labels that {type(model).__name__}.forward takes "
            f"({', '.join(_arguments(type(model))[1]) or 'it takes none'}): give them, or pass loss="
        )
    args, kwargs = as_call(inputs)
    tried: list[str] = []
    with undisturbed(), torch.no_grad(), evaluating(model):
        output = model(*args, **kwargs, **_named(targets))
        for function in dict.fromkeys((model.loss_function, *(LOSS_MAPPING[name] for name in _TASKS))):
            loss = partial(_called, function, model.config)
            try:
                own, found = float(output.loss), float(loss(output, targets))
            except Exception as error:  # noqa: BLE001 - it is not of this task
                tried.append(f"{_name(function)} fails with {type(error).__name__}: {first_line(error)}")
                continue
            if math.isclose(own, found, rel_tol=_TOLERANCE):
                return loss
            tried.append(f"{_name(function)} gives {found:.6g} where the class gives {own:.6g}")
    raise CalibrationError(
        f"none of the losses of transformers that were tried on the first batch is that of {type(model).__name__} "
        f"({'; '.join(tried)}): pass loss=, a callable(output, labels)"
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _named(targets: Any) -> dict[str, Any]:
    return dict(targets) if isinstance(targets, Mapping) else {"labels": targets}


def _called(function: Any, config: PretrainedConfig, output: Any, targets: Any) -> Any:
    """A loss function of transformers with those of the names that it takes: they differ from task to task."""
    offered = {"config": config, "vocab_size": getattr(config.get_text_config(), "vocab_size", None)}
    offered |= dict(output) | _named(targets) | {"pooled_logits": output.get("logits")}
    return function(**{name: offered[name] for name in inspect.signature(function).parameters if name in offered})


def _plan_of(small: nn.Module) -> Any:
    record = pruned_of(small)
    if record is None:
        raise FxpruneError(f"{type(small).__name__} has no plan: give what compress_pretrained or from_pretrained gave")
    return record.plan


def _architecture(folder: Path, device: str) -> Any:
    """A model of the class and configuration that config.json says; on the meta device it costs nothing."""
    paths.regular(folder / CONFIG, ArtifactError, "read")
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        how, name = described["fxprune"], str(described["architectures"][0])
        attention, dtype = how["attn_implementation"], getattr(torch, how["dtype"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / CONFIG} cannot be read ({type(error).__name__}: {first_line(error)}): "
            "name a folder that save_pretrained wrote"
        ) from error
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class):
        raise ArtifactError(f"{folder / CONFIG} names the class {name}, which transformers does not have: update it")
    try:
        config = kind.config_class.from_pretrained(folder, attn_implementation=attention)
        with undisturbed(), torch.device(device):
            return kind(config).to(dtype)
    except Exception as error:
        raise ArtifactError(
            f"{folder / CONFIG} gives no {name} ({type(error).__name__}: {first_line(error)}): "
            "was it altered, or written by another version of transformers?"
        ) from error
