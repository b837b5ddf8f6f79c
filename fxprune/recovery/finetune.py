"""Fine-tuning a pruned model: a thin loop on Lightning Fabric that keeps the best epoch and can be resumed."""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fxprune.caller.arguments import CHECKS, check, check_keywords, chosen
from fxprune.caller.batches import Unpack, length_of
from fxprune.caller.installation import install
from fxprune.caller.isolation import applied, device_of, dtype_of, isolated_copy, seeded
from fxprune.caller.meta import need_numbers
from fxprune.caller.progress import progress_bar
from fxprune.caller.tensors import fingerprint
from fxprune.errors import CalibrationError, FxpruneError, a_kind, blaming, stage
from fxprune.recovery.distillation import Distillation, Goal, Logits, Metric, classes_last
from fxprune.recovery.epochs import Loaders, Training
from fxprune.reporting.records import Finetuning
from fxprune.reporting.report import report, reported, with_report
from fxprune.scoring.objective import Loss
from fxprune.tracing.part import Run

MOMENTUM = 0.9
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
CHECKS["precision"] = chosen(PRECISIONS, FxpruneError)


def finetune(
    small: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    epochs: int = 10,
    lr: float = 0.01,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    loss: Loss | None = None,
    run: Run | None = None,
    metric: Metric | None = None,
    patience: int | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 2.0,
    logits: Logits | None = None,
    unpack: Unpack | None = None,
    checkpoint: str | PathLike[str] | None = None,
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train a pruned model further, and return a copy of it with the weights of the best epoch.

    Needs the extra `finetune` (Lightning Fabric). The learning rate falls to zero along a cosine. The model as given
    counts as epoch 0, so the result is never worse than it on the validation data.

    Args:
        small: a model from `compress` or `apply`; it is not changed.
        train_loader, val_loader: labelled batches as for `score`.
        epochs: passes over `train_loader`.
        lr: the learning rate at the start, of SGD with a momentum of 0.9.
        optimizer: callable(parameters) -> Optimizer, in place of SGD; with its own learning rate.
        loss: callable(output, target) -> mean over the batch; cross-entropy by default.
        run: callable(model, inputs, targets) -> mean loss of the batch, in place of loss(model(inputs), targets); it
            may change the mode of `model`, a copy.
        metric: callable(output, target) -> mean over the batch, larger is better; the best epoch is that with the
            largest metric. By default that with the lowest validation loss.
        patience: stop after so many epochs in a row that were not the best.
        teacher: a model whose outputs are imitated, such as the original; it is not changed.
        distill: the teacher's share in the training loss, 0 < distill <= 1. With 1 no targets are needed.
        temperature: divides both logits before the softmax.
        logits: callable(output) -> logits with the classes along the last axis; by default the output, or its `logits`,
            with the classes along axis 1, or along the last of three axes.
        unpack: a function from a batch to (inputs, targets).
        checkpoint: a file that is written after each epoch. Where it exists, training continues from it.
        precision: "32-true" (as the model is), "bf16-mixed" or "16-mixed"; by default "bf16-mixed" for float32 models
            on a CUDA device that has it.
        seed: of each epoch's random numbers: the order of shuffled batches, augmentation, dropout.
        device: where to train; the model's own device by default.
        progress: show a progress bar on a terminal.

    Returns:
        A module like `small`, on its device and in its mode. `report(...).finetuned` is a `Finetuning`.

    Raises:
        CalibrationError: a loader is empty or one-shot, or a loss is not a finite number; the message names the epoch,
            from 1, and the batch, from 0.
        FxpruneError: an option has no meaning, the checkpoint is not of this run, or the extra is missing.
    """
    check_options(locals())
    report(small)  # raises where there is none
    need_numbers(small, "finetune", CalibrationError)
    place = torch.device(device) if device is not None else device_of(small)
    precision = precision or _precision_for(small, place)
    settings = {
        "epochs": int(epochs), "lr": float(lr), "seed": int(seed), "precision": precision, "model": fingerprint(small),
        "distill": 0.0 if teacher is None else float(distill), "temperature": float(temperature),
    }  # fmt: skip
    with stage("fine-tuning"), seeded(seed), progress_bar(shown=progress) as bar:
        model = applied(isolated_copy(small), "to", place)
        distillation = None
        if teacher is not None:
            guide = applied(applied(isolated_copy(teacher), "to", place), "eval")
            distillation = Distillation(guide, float(distill), float(temperature), logits or classes_last)
        goal = Goal(model, loss or F.cross_entropy, run, metric, distillation)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise FxpruneError(f"no parameter of {type(model).__name__} requires a gradient: there is nothing to train")
        with blaming("optimizer=", f"the parameters of {type(model).__name__}"):
            trained = (optimizer or partial(SGD, lr=lr, momentum=MOMENTUM))(parameters)
        training = _training(goal, trained, length_of(train_loader), Finetuning(int(epochs), precision))
        training.run(Loaders(train_loader, val_loader, unpack, place, seed, bar), checkpoint, settings, patience)
        model.load_state_dict(training.best)
        for module, given in zip(model.modules(), small.modules(), strict=True):
            module.training = given.training
    for graph, _ in reported(model):
        with_report(graph, finetuned=training.done)
    return applied(model, "to", device_of(small))


def check_options(options: Mapping[str, Any]) -> None:
    """Raise FxpruneError where the arguments of `finetune` have no meaning, or Fabric is not installed."""
    if importlib.util.find_spec("lightning_fabric") is None:
        raise FxpruneError(f"fine-tuning needs Lightning Fabric, the extra finetune: {install('finetune')}")
    try:
        check_keywords(finetune, options)
        inspect.signature(finetune).bind(**({"small": None} | dict(options)))
    except TypeError as error:
        raise FxpruneError(f"the options of finetune do not fit ({error}): see fxprune.finetune") from error
    check(finetune, options)
    if options.get("run") and (options.get("metric") or options.get("teacher") is not None):
        raise FxpruneError(
            "run= gives a loss and no output, and metric= and teacher= need one: leave run= or these out"
        )


def _precision_for(model: nn.Module, place: torch.device) -> str:
    """Mixed precision for float32 models where the device computes in bfloat16; the model's own elsewhere."""
    mixed = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if mixed and dtype_of(model) == torch.float32 else "32-true"


def _training(goal: Goal, optimizer: Any, batches: int | None, done: Finetuning) -> Training:
    """A model and its optimizer, set up by Fabric on their device, before the first epoch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook without ipywidgets
        from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    if not isinstance(optimizer, Optimizer):
        raise FxpruneError(
            f"optimizer= gave {a_kind(optimizer)}: it is called with a list of parameters, and returns a "
            "torch.optim.Optimizer, as functools.partial(torch.optim.AdamW, lr=1e-3) does"
        )
    place = device_of(goal.model)
    fabric = Fabric(
        accelerator=place.type,
        devices=1 if place.type == "cpu" else [place.index or 0],
        precision=done.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()],  # one process, whatever launched it
    )
    _, step = fabric.setup(goal.model, optimizer)
    schedule = LambdaLR(optimizer, partial(_cosine, steps=done.epochs * (batches or 1)))
    return Training(goal, fabric, optimizer, step, schedule, bool(batches), done)


def _cosine(step: int, *, steps: int) -> float:
    """The factor on the learning rate: from 1 to 0 along half a cosine (arXiv 1608.03983, without restarts)."""
    return (1 + math.cos(math.pi * min(step / steps, 1))) / 2
