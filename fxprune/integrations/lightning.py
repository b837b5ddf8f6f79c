"""Lightning: a callback that prunes the network of a LightningModule by the loss of its training step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn

from fxprune.caller.isolation import seeded
from fxprune.errors import CalibrationError, FxpruneError, a_kind
from fxprune.pipeline import compress
from fxprune.reporting.report import Report, report
from fxprune.tracing.part import part_of

try:
    from lightning.pytorch import Callback
except ImportError:  # the same code under its other name
    from pytorch_lightning import Callback  # type: ignore[assignment, unused-ignore]

__all__ = ["Compress"]

When = Literal["start", "end"] | int


class Compress(Callback):  # type: ignore[misc, unused-ignore]
    """Prunes the network of a LightningModule once: before, during or after `Trainer.fit`.

    The network is a child of the LightningModule, such as `self.model`; a smaller graph replaces it. Units are scored
    by the loss that `training_step` returns, on the first batches of the training data. The module's hooks around the
    transfer of batches are called; meanwhile `self.log` does nothing, and there is no `self.trainer`.

    Args:
        alpha: the tolerance, see `fxprune.compress`; a budget may stand in its place.
        when: "end" of a fit; "start" of one, before the optimizers are made, to fine-tune the smaller network; or the
            number of the epoch at whose start to prune, for which the optimizers are set up anew.
        network: path of the network in the module; by default its only child that has parameters.
        loader: calibration batches; by default those that the Trainer trains on.
        batches: how many of them to take.
        options: all others of `fxprune.compress`, such as `macs=0.7` or `exclude=`.

    After pruning, `report` is the report of the network.

    Raises:
        FxpruneError: in the hook, where the network is not known, the module optimises by hand, there are several
            processes, or no batches; and all errors of `compress`.
    """

    def __init__(
        self,
        alpha: float | None = None,
        *,
        when: When = "end",
        network: str | None = None,
        loader: Iterable[Any] | None = None,
        batches: int = 16,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(when, str) and when not in ("start", "end"):
            raise FxpruneError(f'when is {when!r}: it is "start", "end" or the number of an epoch')
        if batches < 1:
            raise FxpruneError(f"batches is {batches}: at least one is needed")
        self.when, self.network, self.loader, self.batches = when, network, loader, batches
        self.options = {"alpha": alpha} | options
        self.report: Report | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prune before the optimizers are made."""
        if stage == "fit" and self.when == "start":
            self._prune(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Prune at the start of the epoch, and give the optimizers the new parameters."""
        if self.when == trainer.current_epoch and self._prune(trainer, pl_module):
            trainer.strategy.setup_optimizers(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Prune what was trained."""
        if self.when == "end":
            self._prune(trainer, pl_module)

    def _prune(self, trainer: Any, module: Any) -> bool:
        """Put a smaller network into a module; False where that was done before."""
        if self.report is not None:
            return False
        if not module.automatic_optimization:
            raise FxpruneError(
                f"{type(module).__name__} optimises by hand, so its training_step need not return the loss: prune it "
                "with fxprune.compress(module, loader, submodule=..., run=...)"
            )
        if trainer.world_size > 1:
            raise FxpruneError(
                f"the Trainer runs {trainer.world_size} processes, which would prune apart: prune in one, with "
                "devices=1, and train the result in several"
            )
        path = self.network or network_of(module)
        options = {"submodule": path, "run": training_loss, "unpack": lambda batch: (batch, None), **self.options}
        with seeded(int(options.get("seed", 0))):
            taken = islice(self._loader(trainer), self.batches)
            before, after = module.on_before_batch_transfer, module.on_after_batch_transfer
            found = [after(before(batch, 0), 0) for batch in taken]  # compress moves them to the device
        attached, module.trainer = module._trainer, None  # the Trainer would be copied with the module
        try:
            small = compress(module, found, **options)
        finally:
            module.trainer = attached
        parent, _, name = path.rpartition(".")
        setattr(part_of(module, parent), name, part_of(small, path))
        self.report = report(part_of(module, path))
        return True

    def _loader(self, trainer: Any) -> Iterable[Any]:
        """The calibration batches."""
        if self.loader is not None:
            return self.loader
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        if loader is None or isinstance(loader, (Mapping, list, tuple)):
            raise FxpruneError(
                f"the Trainer trains on {a_kind(loader)} in place of one loader: pass loader=, whose batches "
                "are as training_step takes them"
            )
        return loader  # type: ignore[no-any-return]


def network_of(module: nn.Module) -> str:
    """The name of the only child of a module that has parameters.

    Raises FxpruneError where there are several, or none.

    >>> network_of(nn.ModuleDict({"net": nn.Linear(2, 1), "loss": nn.MSELoss()}))
    'net'
    """
    names = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    if len(names) != 1:
        raise FxpruneError(
            f"{type(module).__name__} has {len(names)} children with parameters ({', '.join(names) or 'none'}): pass "
            "network=, the name of the one to prune; layers of the module itself have to be gathered in one first"
        )
    return names[0]


def training_loss(module: Any, batch: Any, targets: None) -> Tensor:
    """The loss that a LightningModule's training_step returns, with nothing logged."""
    del targets
    vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None))
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    output = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise CalibrationError(
            f"{type(module).__name__}.training_step returned {a_kind(loss)}, not a loss or a dict with one"
        )
    return loss
