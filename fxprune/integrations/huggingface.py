"""Hugging Face transformers: pruning a model by the loss of its own class, and folders that hold a pruned model."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from fxprune.caller.arguments import CHECKS
from fxprune.caller.batches import Unpack, batch_to_device, batches, split
from fxprune.caller.example import as_call
from fxprune.caller.files import folder as folder_at
from fxprune.caller.files import made_folder, regular, replacing
from fxprune.caller.isolation import device_of, evaluating, isolated_copy, undisturbed
from fxprune.caller.tensors import named_tensors, put
from fxprune.coupling.branch_units import WHOLE
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import Coupling
from fxprune.errors import (
    ArtifactError,
    CalibrationError,
    FxpruneError,
    NarrowError,
    UnreachableError,
    a,
    error_text,
    is_out_of_memory,
    stage,
    summary,
)
from fxprune.integrations.class_saving import CONFIG, WEIGHTS, WIDTHS, Saving, check_weights, narrowed_class
from fxprune.integrations.plain import OWN_CLASS, Change, built, built_shapes, changes_of, limits_by
from fxprune.integrations.plain_options import advised, check_inexact, inexact_helps, multiples, others
from fxprune.pipeline import apply, compress
from fxprune.planning.allocation import ONLY
from fxprune.planning.budgets import INEXACT
from fxprune.planning.plan import kept_units
from fxprune.planning.planned import Planned
from fxprune.reporting.attach import note_call
from fxprune.reporting.provenance import call_of
from fxprune.reporting.report import note_in_class, pruned_of
from fxprune.rewriting.class_limits import keep_to
from fxprune.rewriting.own_class import compare, narrow
from fxprune.rewriting.shorter_lists import removed_blocks, renaming
from fxprune.saving.artifact import load, save
from fxprune.scoring.objective import Loss
from fxprune.tracing.graph import RECORD, ClassLimits, ModelGraph, example_of
from fxprune.tracing.part import with_captured_part

__all__ = ["compress_pretrained", "from_pretrained", "narrow_pretrained", "save_pretrained"]

_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForCausalLM")
_MISFITS = (  # the errors of a loss of another task
    TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
_TOLERANCE = 1e-3  # of the two losses: another formula differs by more, another rounding by less


def compress_pretrained(
    model: PreTrainedModel,
    loader: Iterable[Any],
    alpha: float | None = None,
    *,
    loss: Loss | None = None,
    unpack: Unpack | None = None,
    new_biases: bool = False,
    plain: bool = False,
    **options: Any,
) -> nn.Module:
    """`fxprune.compress` for a model of transformers, with `unpack` and `loss` chosen for its class.

    Batches are those of a Trainer: dicts that include the labels; columns that the forward does not take are left out.
    The loss is the one that the class computes from labels: `loss_function` of the model, or one of transformers for a
    usual task, whichever agrees with the class on the first batch. The model runs without its cache of keys and values.

    Args:
        model: with a head, in any mode and on any device; it is not changed.
        loader: re-iterable batches of dicts, or of pairs (inputs, labels).
        alpha: the tolerance, see `compress`; a budget may stand in its place.
        loss, unpack: those of `compress`, in place of the ones that are chosen here.
        new_biases: whether layers without a bias may get one; classes of transformers have no place for it.
        plain: return a model of the class, built by a configuration that says the new widths. `equal_blocks` is True
            then; what the configuration cannot say is kept whole, and the report says why. With `blocks`, whole
            blocks of the list of layers can be removed, and the configuration has fewer. `save_pretrained` of the
            result writes a folder that transformers loads without fxprune.
        options: all others of `compress`.

    Returns:
        The result of `compress`: a graph that takes the forward's arguments except labels, and returns the outputs of
        the class without a loss. `narrow_pretrained` makes the class of it; `own_class=True` returns the class at once,
        and what its code does not run narrower is kept whole.

    Raises:
        CalibrationError: the batches have no labels, or the loss of the class is not a known function of its outputs
            and labels.
        FxpruneError: one of its children, from the stage that failed.
    """
    call = call_of(compress_pretrained, locals())
    own = _without_cache(model)
    unpack = unpack or partial(columns, *arguments_of(type(model)), _shift_of(model))
    loss = loss or _loss_of_class(own, loader, unpack)
    chosen: dict[str, Any] = {"loss": loss, "unpack": unpack, "new_biases": new_biases}
    if plain:
        return _plain(model, own, loader, alpha, call, options | chosen)
    small = compress(own, loader, alpha, **chosen, **options)
    note_call(small, call, loader, options.get("submodule", ""))
    return narrowed_class(_with_cache_of(model, small), model) if options.get("own_class") else small


def _plain(
    model: PreTrainedModel, own: PreTrainedModel, loader: Iterable[Any], alpha: float | None, call: str,
    options: dict[str, Any],
) -> PreTrainedModel:  # fmt: skip
    """`compress_pretrained` where a configuration has to say the widths; `own` is a copy without a cache."""
    options = others(options)
    coupled: dict[str, Any] = {
        name: options[name] for name in ("exclude", "unknown", "inexact", "head_dim", "query_heads") if name in options
    }
    asked = {name: options.get(name) for name in ("unpack", "run")}
    CHECKS["blocks"]("blocks", blocks := options.get("blocks", False))
    graph: Any = with_captured_part(own, loader, "", options.get("exclude", ()), **asked)  # type: ignore[arg-type]
    with stage("coupling"), undisturbed():
        check_inexact(model, graph, coupled)
        coupling = analyse(graph, **coupled, blocks=WHOLE if blocks else "")
        built_shapes(model)
        changes = () if blocks == ONLY else changes_of(model, coupling)
        limits = limits_by(changes, coupling, model.config)
        keep_to(graph, replace(limits, blocks=WHOLE) if blocks else limits)
    rounded = {"round_to": multiples(changes, coupling, options.get("round_to", 1))}
    try:
        small = compress(graph, loader, alpha, new_biases=False, equal_blocks=True, **options | rounded)
    except UnreachableError as error:
        keep_to(graph, ClassLimits(blocks=WHOLE if blocks else ""))
        inexact = INEXACT in error.remedies and inexact_helps(model, graph, coupled)
        raise advised(error, options, held=bool(limits.held or limits.counts), inexact=inexact) from error
    note_call(small, call, loader, "")
    return plain_model(model, small, graph, coupling, changes)


def plain_model(
    model: PreTrainedModel, small: nn.Module, graph: ModelGraph, coupling: Coupling, changes: Sequence[Change]
) -> PreTrainedModel:
    """The class of `model` with the weights of `small`, which was made of `graph`, compared with it on the example."""
    record: Any = pruned_of(small)
    with stage("narrowing"), undisturbed():
        planned = Planned(graph, coupling, kept_units(record.plan, coupling))
        own = built(model, small, changes, planned)
        try:
            compare(_without_cache(own), small, example_of(graph))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NarrowError(
                f"{type(own).__name__}, built by a configuration of the new widths, does not give what the graph gives "
                f"({summary(error)}): {OWN_CLASS}"
            ) from error
        note_in_class(own, small)
    vars(own)["save_pretrained"] = Saving(own, plain=True)
    return own  # type: ignore[no-any-return]


def narrow_pretrained(small: nn.Module, model: PreTrainedModel) -> PreTrainedModel:
    """The result of `compress_pretrained` in the class of `model`: with a loss, and for a Trainer.

    Args:
        small: the graph; its weights and modes are taken.
        model: the model that it was made from, or one of its architecture.

    Raises:
        NarrowError: the class does not run with narrower layers, see `fxprune.narrow`.
    """
    record, saving = pruned_of(small), vars(small).get("save_pretrained")
    if isinstance(saving, Saving):
        raise FxpruneError(
            f"{type(small).__name__} is a model of its own class already, by {'plain' if saving.plain else 'own_class'}"
            "=True or narrow_pretrained: use it as it is"
        )
    if record is None or not isinstance(small, ModelGraph):
        raise FxpruneError(
            f"{type(small).__name__} has no plan: give the graph that compress_pretrained or from_pretrained of "
            "fxprune gave"
        )
    own = _with_cache_of(model, narrow(_without_cache(model), record.plan, weights=small))
    rename = renaming(removed_blocks(record.plan))
    modes = {rename(name): module.training for name, module in small.named_modules()}
    for name, module in own.named_modules():
        module.training = modes.get(name, small.training)
    for name, parameter in small.named_parameters():
        own.get_parameter(rename(name)).requires_grad_(parameter.requires_grad)
    note_in_class(own, small)
    return narrowed_class(own, model)  # type: ignore[no-any-return]


def save_pretrained(small: nn.Module, folder: str | PathLike[str], model: PreTrainedModel | None = None) -> None:
    """Write a pruned model into a folder: the configuration as config.json, and the rest as `fxprune.save` does.

    Args:
        small: from `compress_pretrained` or `narrow_pretrained`, a graph or a model of its own class; later changes of
            it, such as fine-tuning, are kept. A plain model is written as transformers writes it.
        folder: it is made where it is missing.
        model: the model that `small` was made from, for its class and configuration; a plain model needs none.

    Raises:
        ArtifactError: the class is none of transformers' own, `small` has no plan, the folder holds the weights of a
            checkpoint of the other kind, or a file cannot be written.
    """
    saving = vars(small).get("save_pretrained")
    if isinstance(saving, Saving) and saving.plain:
        saving(folder)
        return
    if model is None:
        raise ArtifactError(f"{type(small).__name__} is no plain model: pass model=, that which it was made from")
    if model.config.to_dict().get(WIDTHS):
        raise ArtifactError(
            f"model= is a {type(model).__name__} that was pruned itself, so its configuration does not build it: pass "
            "the model that this one was made from, and prune that one once, or in several rounds (rounds=)"
        )
    if isinstance(saving, Saving):
        small = _graph_of(small, model)
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ArtifactError(
            f"{name} is no class of transformers, so its name in {CONFIG} would not lead to it: use fxprune.save, and "
            f"fxprune.load with model= {a(name)}"
        )
    place = made_folder(folder, ArtifactError)
    check_weights(place, plain=False)
    save(small, place / WEIGHTS)
    described = json.loads(model.config.to_json_string())
    how = {"attn_implementation": model.config._attn_implementation, "dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(place / CONFIG, ArtifactError) as file:
        text = json.dumps(described | {"architectures": [name], "fxprune": how}, indent=2, sort_keys=True)
        file.write_text(text + "\n", encoding="utf-8")


def _graph_of(own: nn.Module, model: PreTrainedModel) -> nn.Module:
    """The graph of a model that was narrowed in its own class, with its weights, modes and report."""
    record = pruned_of(own)
    if record is None:
        raise ArtifactError(f"{type(own).__name__} has no plan: it was copied or loaded without fxprune's record")
    small: Any = apply(_without_cache(model), record.plan)
    rename = renaming(removed_blocks(record.plan))
    names = {rename(name): name for name in (*named_tensors(small), *dict(small.named_modules()))}
    for here, tensor in named_tensors(own).items():
        name = names.get(here, here)
        if name in named_tensors(small) or name in record.history.biases:
            put(small, name, tensor)
    for name, parameter in own.named_parameters():
        small.get_parameter(names[name]).requires_grad_(parameter.requires_grad)
    modes = {name: module.training for name, module in own.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(rename(name), own.training)
    small.meta[RECORD] = replace(record, history=replace(small.meta[RECORD].history, biases=record.history.biases))
    return small  # type: ignore[no-any-return]


def from_pretrained(folder: str | PathLike[str], *, own_class: bool = False) -> nn.Module:
    """The model that `save_pretrained` wrote: its architecture from the configuration, then `fxprune.load`.

    Nothing is downloaded, and only the code of transformers and fxprune runs.

    Args:
        folder: with config.json and fxprune.safetensors.
        own_class: return the class that config.json names in place of a graph, see `narrow_pretrained`.

    Raises:
        ArtifactError: a file is missing or was altered, or names a class that transformers does not have.
        NarrowError: with `own_class`, where that cannot be.
    """
    place = folder_at(folder, ArtifactError, "read")
    model = _architecture(place / CONFIG, "cpu" if own_class else "meta")
    small = load(place / WEIGHTS, _without_cache(model))
    return narrow_pretrained(small, model) if own_class else small


def _without_cache(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that neither returns nor takes cached keys and values."""
    if not isinstance(model, PreTrainedModel):
        raise FxpruneError(f"{type(model).__name__} is no PreTrainedModel of transformers: use fxprune.compress")
    own: Any = isolated_copy(model)
    for config in configurations(own):
        config.update({"use_cache": False} if "use_cache" in config.to_dict() else {})
    return own  # type: ignore[no-any-return]


def _with_cache_of(model: nn.Module, own: nn.Module) -> nn.Module:
    """A narrowed copy of a model, which is changed, with the cache that the model has."""
    for mine, theirs in zip(configurations(own), configurations(model), strict=True):
        mine.update({"use_cache": theirs.use_cache} if "use_cache" in theirs.to_dict() else {})
    return own


def configurations(model: nn.Module) -> list[PretrainedConfig]:
    """The configurations that the modules of a model hold, each once."""
    held = {id(config): config for module in model.modules() for config in [vars(module).get("config")]}
    return [config for config in held.values() if isinstance(config, PretrainedConfig)]


_CONTRASTIVE = "return_loss"  # the argument by which models of images and texts compute their loss without labels
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
_TARGETS = ("start_positions", "end_positions", "future_values")  # what a loss compares with, under other names


def arguments_of(kind: type[PreTrainedModel]) -> tuple[list[str], list[str]]:
    """The names of the forward's arguments that are inputs, and of those that are labels."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    labels = [n for n in names if ("label" in n and n != "input_labels") or n in _TARGETS]  # input_labels: of a prompt
    labels = labels or [n for n in names if n == _CONTRASTIVE]
    return [name for name in names if name not in labels], labels


def _shift_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """The function that makes what a decoder reads of the labels; None where there is no encoder beside it."""
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return lambda labels: own(labels=labels)
    shift = getattr(inspect.getmodule(type(model)), "shift_tokens_right", None)
    config: Any = model.config
    if shift is None or not getattr(config, "is_encoder_decoder", False):
        return None
    return lambda labels: shift(labels, config.pad_token_id, config.decoder_start_token_id)


def columns(
    inputs: list[str], labels: list[str], shift: Callable[[Tensor], Tensor] | None, batch: Any
) -> tuple[Any, Any]:
    """The inputs and the labels of a batch: the one column of labels, or a dict of several, or None.

    What a decoder reads is made of the labels where it is not given, by the function `shift` of an encoder-decoder.
    """
    if not isinstance(batch, Mapping):
        return split(batch)
    given = {name: column for name, column in batch.items() if column is not None}
    targets = {name: given[name] for name in labels if name in given}
    found = targets["labels"] if list(targets) == ["labels"] else targets or None
    if found is None and _CONTRASTIVE in labels:
        found = torch.arange(len(next(iter(given.values()))))  # each text belongs to the image of its number
    if shift is not None and "labels" in given and given.keys().isdisjoint(_DECODED):
        given["decoder_input_ids"] = shift(given["labels"])
    return {name: given[name] for name in inputs if name in given}, found


def _loss_of_class(model: PreTrainedModel, loader: Iterable[Any], unpack: Unpack) -> Loss:
    """The loss that a class computes, as a function of its outputs and labels; compared with its own on one batch."""
    inputs, targets = batch_to_device(next(iter(batches(loader, unpack))), device_of(model))
    if targets is None:
        raise CalibrationError(
            f"the batches have no labels that {type(model).__name__}.forward takes "
            f"({', '.join(arguments_of(type(model))[1]) or 'it takes none'}): give them, or pass loss="
        )
    args, kwargs = as_call(inputs)
    tried: list[str] = []
    with undisturbed(), torch.no_grad(), evaluating(model), _as_configured(model):
        labels = dict(targets) if isinstance(targets, Mapping) else {"labels": targets}
        labels = {_CONTRASTIVE: True} if _CONTRASTIVE in arguments_of(type(model))[1] else labels
        output = model(*args, **kwargs, **labels)
        tasks = (LOSS_MAPPING[name] for name in _TASKS)
        for function in dict.fromkeys((model.loss_function, *tasks, _forecast, _matched, _paired)):
            loss = partial(_called, function, model.config)
            name = getattr(function, "__name__", type(function).__name__)
            try:
                own, found = float(output.loss), float(loss(output, targets))
            except _MISFITS as error:
                tried.append(f"{name} fails with {error_text(error)}")
                continue
            if math.isclose(own, found, rel_tol=_TOLERANCE):
                return loss
            tried.append(f"{name} gives {found:.6g} where the class gives {own:.6g}")
    raise CalibrationError(
        f"none of the losses of transformers that were tried on the first batch is that of {type(model).__name__} "
        f"({'; '.join(tried)}): pass loss=, a callable(output, labels)"
    )


@contextmanager
def _as_configured(model: nn.Module) -> Iterator[None]:
    """Restore the fields of configurations, which some losses and forwards set, such as `problem_type`."""
    before = [(config, dict(vars(config))) for config in configurations(model)]
    try:
        yield
    finally:
        for config, fields in before:
            vars(config).clear()
            vars(config).update(fields)


def _forecast(prediction_outputs: Tensor, future_values: Tensor) -> Tensor:
    """The loss of most models of time series."""
    return F.mse_loss(prediction_outputs, future_values)


def _matched(logits_per_text: Tensor) -> Tensor:
    """The loss of CLIP: of each text among the images, and of each image among the texts."""
    numbers = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, numbers) + F.cross_entropy(logits_per_text.T, numbers)) / 2


def _paired(logits_per_text: Tensor) -> Tensor:
    """The loss of SigLIP: whether each text belongs to each image."""
    signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
    return -F.logsigmoid(signs * logits_per_text).sum(-1).mean()


def _called(function: Any, config: PretrainedConfig, output: Any, targets: Any) -> Any:
    """A loss function of transformers with those of the names that it takes: they differ from task to task."""
    offered = {"config": config, "vocab_size": getattr(config.get_text_config(), "vocab_size", None)}
    labels = dict(targets) if isinstance(targets, Mapping) else {"labels": targets}
    offered |= dict(output) | labels | {"pooled_logits": output.get("logits")}
    return function(**{name: offered[name] for name in inspect.signature(function).parameters if name in offered})


def _architecture(path: Path, device: str) -> Any:
    """A model of the class and configuration in config.json; on the meta device it takes no memory."""
    regular(path, ArtifactError, "read")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if "fxprune" not in described and not (path.parent / WEIGHTS).exists():
            if "pruned_shapes" in described:
                raise ArtifactError(
                    f"{path.parent} holds a narrowed class, which no class loads: write it with "
                    "fxprune.integrations.huggingface.save_pretrained(model, folder, original)"
                )
            raise ArtifactError(
                f"{path.parent} holds a plain checkpoint: load it with transformers, AutoModel.from_pretrained"
            )
        how, name = described["fxprune"], str(described["architectures"][0])
        attention, dtype = how["attn_implementation"], getattr(torch, how["dtype"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error_text(error)}): name a folder that save_pretrained wrote"
        ) from error
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class):
        raise ArtifactError(f"{path} names the class {name}, which transformers does not have: update it")
    try:
        config = kind.config_class.from_pretrained(path.parent, attn_implementation=attention)
        with undisturbed(), torch.device(device):
            return kind(config).to(dtype)
    except Exception as error:
        raise ArtifactError(
            f"{path} gives no {name} ({error_text(error)}): was it altered, or written by another version of "
            "transformers?"
        ) from error
