"""The epochs of fine-tuning: each seeded and validated, and the best weights are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxprune.caller.batches import LONGEST_EPOCH, Unpack, batch_to_device, batches, length_of, sample_count
from fxprune.caller.isolation import applied, seeded, stateless
from fxprune.errors import blaming
from fxprune.recovery.distillation import Goal
from fxprune.recovery.epoch_checkpoint import read, write
from fxprune.reporting.records import Finetuning


@dataclass(frozen=True, slots=True)
class Loaders:
    """The batches of an epoch on a device, in an order that depends only on the seed and the number of the epoch."""

    train: Iterable[Any]
    val: Iterable[Any]
    unpack: Unpack | None
    place: torch.device
    seed: int
    bar: Progress

    def show(self, epochs: int) -> None:
        """Start the progress bar, for so many epochs."""
        lengths = [length_of(loader) for loader in (self.train, self.val)]
        known = [length for length in lengths if length is not None]
        self.bar.add_task("fine-tuning", total=epochs * sum(known) if len(known) == len(lengths) else None)

    def batches(self, name: str, epoch: int) -> Iterator[tuple[Any, Any, str]]:
        """The inputs and targets of the batches of `train_loader` or `val_loader`, and their name in messages."""
        loader = self.train if name == "train_loader" else self.val
        when = f"epoch {epoch}" if epoch else "the model before its first epoch"
        source = batches(loader, self.unpack, name=name, when=f"{when}, ", most=LONGEST_EPOCH)
        for index, batch in enumerate(source):
            where = f"{when}, batch {index} of {name}"
            with blaming(f"moving to {self.place}", where):
                inputs, targets = batch_to_device(batch, self.place)
            yield inputs, targets, where
            for task in self.bar.task_ids:
                self.bar.advance(task)

    @contextmanager
    def seeded(self, epoch: int) -> Iterator[None]:
        """Seed all random generators, the loaders' own too, for one epoch."""
        with ExitStack() as stack:
            stack.enter_context(seeded(_seed_of(self.seed, epoch)))
            for generator in {id(g): g for loader in (self.train, self.val) for g in _generators(loader)}.values():
                stack.callback(generator.set_state, generator.get_state())
                generator.manual_seed(_seed_of(generator.initial_seed(), self.seed, epoch))
            yield


def _seed_of(*numbers: int) -> int:
    """One seed made of several numbers."""
    return int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1)[0])


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """The generators that a DataLoader and its samplers hold."""
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    for owner in (*owners, getattr(owners[-1], "sampler", None)):
        found = getattr(owner, "generator", None)
        if isinstance(found, torch.Generator):
            yield found


@dataclass(slots=True)
class Training:
    """A model in training: its objective, optimizer and schedule, the results so far, and the best weights.

    `step` is Fabric's handle on the optimizer. The schedule advances with every batch where `by_batch`, otherwise with
    every epoch.
    """

    goal: Goal
    fabric: Any
    optimizer: Optimizer
    step: Any
    schedule: LRScheduler
    by_batch: bool
    done: Finetuning
    best: dict[str, Any] = field(default_factory=dict)

    def run(
        self, loaders: Loaders, checkpoint: str | PathLike[str] | None, settings: Mapping[str, Any],
        patience: int | None,
    ) -> None:  # fmt: skip
        """Run the remaining epochs, with a checkpoint after each, until `patience` in a row were not the best."""
        state = read(checkpoint, settings, loaders.place) if checkpoint is not None else None
        loaders.show(self.done.epochs + 1 if state is None else self.done.epochs - len(state["done"]["train_losses"]))
        if state is None:
            with loaders.seeded(0):
                self._judge(loaders, 0)
        else:
            self._load(state)
        while self.done.ran < self.done.epochs and (patience is None or self.done.ran - self.done.best < patience):
            epoch = self.done.ran + 1
            with loaders.seeded(epoch):
                lost = self._train(loaders, epoch)
                self.done = replace(self.done, train_losses=(*self.done.train_losses, lost))
                self._judge(loaders, epoch)
            if checkpoint is not None:
                write(checkpoint, settings, self._state())

    def _train(self, loaders: Loaders, epoch: int) -> float:
        """One pass over the training data: the mean loss."""
        applied(self.goal.model, "train")
        losses, weights = list[float](), list[int]()
        for inputs, targets, where in loaders.batches("train_loader", epoch):
            with self.fabric.autocast():
                value = self.goal.value(inputs, targets, where)
            with blaming("the training step", where):
                self.fabric.backward(value)
                self.step.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.by_batch:
                self.schedule.step()
            losses.append(float(value.detach()))
            weights.append(self._weight(inputs))
        if not self.by_batch:
            self.schedule.step()
        return _mean(losses, weights)

    def _judge(self, loaders: Loaders, epoch: int) -> None:
        """One pass over the validation data: the mean loss and metric are added, and the best weights are kept."""
        applied(self.goal.model, "eval")
        found = list[tuple[float, float, int]]()
        # `run` may put the model into training mode, where BatchNorm would count batches
        with stateless(self.goal.model) if self.goal.run else nullcontext():
            for inputs, targets, where in loaders.batches("val_loader", epoch):
                with self.fabric.autocast():
                    found.append((*self.goal.judged(inputs, targets, where), self._weight(inputs)))
        loss, metric, weights = zip(*found, strict=True)
        losses = *self.done.val_losses, _mean(loss, weights)
        metrics = (*self.done.metrics, _mean(metric, weights)) if self.goal.metric else ()
        best = metrics.index(max(metrics)) if metrics else losses.index(min(losses))
        self.done = replace(self.done, val_losses=losses, metrics=metrics, best=best)
        if best == epoch:
            self.best = copy.deepcopy(self.goal.model.state_dict())

    def _weight(self, inputs: Any) -> int:
        """The weight of a batch in a mean: the number of its samples, unless `run` takes them in its own way."""
        return 1 if self.goal.run else sample_count(inputs)

    def _state(self) -> dict[str, Any]:
        """The state that the next epoch depends on."""
        return {
            "model": self.goal.model.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "scaler": self.fabric.strategy.precision.state_dict(),
            "done": asdict(self.done),
        }  # fmt: skip

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore what `_state` gave."""
        self.goal.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.best, self.done = state["best"], Finetuning(**state["done"])


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
