"""The epochs of fine-tuning: seeded one by one, judged on validation data, and kept where they are the best."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxprune.caller.batches import LONGEST_EPOCH, Unpack, batch_to_device, batches, length_of, sample_count
from fxprune.caller.isolation import applied, seeded
from fxprune.errors import blaming
from fxprune.recovery.distillation import Goal
from fxprune.recovery.epoch_checkpoint import read, write
from fxprune.reporting.records import Finetuning


@dataclass(frozen=True, slots=True)
class Loaders:
    """The batches of an epoch on a device, in an order that depends on the seed and the number of the epoch alone."""

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
        """The inputs and targets of the batches of `train_loader` or `val_loader`, and what messages call them."""
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
        """Work with all random numbers, those of the loaders' own generators too, set for one epoch."""
        with ExitStack() as stack:
            stack.enter_context(seeded(_mixed(self.seed, epoch)))
            for generator in {id(g): g for loader in (self.train, self.val) for g in _generators(loader)}.values():
                stack.callback(generator.set_state, generator.get_state())
                generator.manual_seed(_mixed(generator.initial_seed(), self.seed, epoch))
            yield


def _mixed(*numbers: int) -> int:
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
class Course:
    """A model on its way through the epochs: what trains it, what was reached, and the best weights so far.

    `step` is Fabric's handle on the optimizer. The schedule goes on with every batch where `by_batch`, else with every
    epoch.
    """

    goal: Goal
    fabric: Any
    optimizer: Optimizer
    step: Any
    schedule: LRScheduler
    by_batch: bool
    done: Finetuning
    best: dict[str, Any] = field(default_factory=dict)

    def go(
        self,
        loaders: Loaders,
        checkpoint: str | PathLike[str] | None,
        settings: Mapping[str, Any],
        patience: int | None,
    ) -> None:
        """Run the epochs that are left, with a checkpoint after each."""
        state = read(checkpoint, settings, loaders.place) if checkpoint is not None else None
        loaders.show(self.done.epochs + 1 if state is None else self.done.epochs - len(state["done"]["train_losses"]))
        if state is None:
            with loaders.seeded(0):
                self._judge(loaders, 0)
        else:
            self._load(state)
        while self.done.ran < self.done.epochs and not self._stops(patience):
            epoch = self.done.ran + 1
            with loaders.seeded(epoch):
                lost = self._train(loaders, epoch)
                self.done = replace(self.done, train_losses=(*self.done.train_losses, lost))
                self._judge(loaders, epoch)
            if checkpoint is not None:
                write(checkpoint, settings, self._state())

    def _stops(self, patience: int | None) -> bool:
        """Whether so many epochs in a row were not the best."""
        return patience is not None and self.done.ran - self.done.best >= patience

    def _train(self, loaders: Loaders, epoch: int) -> float:
        """One pass over the training data: the mean loss."""
        applied(self.goal.model, "train")
        mean = _Mean()
        for inputs, targets, where in loaders.batches("train_loader", epoch):
            with self.fabric.autocast():
                value = self.goal.value(inputs, targets, where)
            with blaming("the training step", where):
                self.fabric.backward(value)
                self.step.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.by_batch:
                self.schedule.step()
            mean.add(float(value.detach()), self._weight(inputs))
        if not self.by_batch:
            self.schedule.step()
        return mean.value

    def _judge(self, loaders: Loaders, epoch: int) -> None:
        """One pass over the validation data: adds the mean loss and metric, and keeps the weights if they are best."""
        applied(self.goal.model, "eval")
        loss, metric = _Mean(), _Mean()
        with _same_buffers(self.goal):
            for inputs, targets, where in loaders.batches("val_loader", epoch):
                with self.fabric.autocast():
                    values = self.goal.judged(inputs, targets, where)
                for mean, value in zip((loss, metric), values, strict=True):
                    mean.add(value, self._weight(inputs))
        losses = *self.done.val_losses, loss.value
        metrics = (*self.done.metrics, metric.value) if self.goal.metric else ()
        best = metrics.index(max(metrics)) if metrics else losses.index(min(losses))
        self.done = replace(self.done, val_losses=losses, metrics=metrics, best=best)
        if best == epoch:
            self.best = copy.deepcopy(self.goal.model.state_dict())

    def _weight(self, inputs: Any) -> int:
        """The weight of a batch in a mean: its samples, where the model takes them along the first axis."""
        return 1 if self.goal.run else sample_count(inputs)

    def _state(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "model": self.goal.model.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "scaler": self.fabric.strategy.precision.state_dict(),
            "done": asdict(self.done),
        }  # fmt: skip

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take up what `_state` gave."""
        self.goal.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.best, self.done = state["best"], Finetuning(**state["done"])


@dataclass(slots=True)
class _Mean:
    """A weighted mean of numbers, as they come."""

    total: float = 0.0
    weight: int = 0

    def add(self, value: float, weight: int) -> None:
        self.total, self.weight = self.total + value * weight, self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight


@contextmanager
def _same_buffers(goal: Goal) -> Iterator[None]:
    """Give a model its buffers back where `run` may put it into training mode, and BatchNorm would go on counting."""
    kept = [(buffer, buffer.clone()) for buffer in goal.model.buffers()] if goal.run else []
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
