"""The callback for Lightning: what it prunes, when, and that the module is otherwise left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import CalibrationError, FxpruneError

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning
pytest.importorskip("fxprune.integrations.lightning", exc_type=ImportError)

from integrated import SILENT, LitDigits, Trainer, accuracy, digit_batches  # noqa: E402

from fxprune.integrations.lightning import Compress, network_of  # noqa: E402


def fitted(module: Any, callback: Any, *, epochs: int = 1, **options: Any) -> Any:
    trainer = Trainer(max_epochs=epochs, callbacks=[callback], **SILENT | options)
    trainer.fit(module, digit_batches())
    return trainer


def width(module: Any) -> int:
    return int(module.model.get_submodule("0").out_channels)


def test_at_the_end_what_was_trained_is_pruned() -> None:
    torch.manual_seed(0)
    module, callback = LitDigits(), Compress(macs=0.6)
    trainer = fitted(module, callback, epochs=12)
    assert isinstance(module.model, torch.fx.GraphModule)
    assert callback.report is not None
    assert callback.report.macs_after <= 0.6 * callback.report.macs_before
    assert callback.report == fxprune.report(module.model)
    assert module.trainer is trainer or module._trainer is not None
    assert "log" not in vars(module)
    assert accuracy(module.model) > 0.9


def test_at_the_start_the_optimizer_trains_what_is_left() -> None:
    torch.manual_seed(0)
    module, seen = LitDigits(), {}

    class Look(Compress):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            seen["trained"] = held == {id(p) for p in pl_module.model.parameters()}
            seen["weight"] = pl_module.model.get_submodule("0").weight.clone()

    callback = Look(params=0.5, when="start")
    fitted(module, callback)
    assert seen["trained"]
    assert width(module) < 16
    assert not torch.equal(seen["weight"], module.model.get_submodule("0").weight)


def test_at_an_epoch_the_optimizers_are_set_up_anew() -> None:
    torch.manual_seed(0)
    module, widths = LitDigits(), []

    class Look(Compress):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert held == {id(p) for p in pl_module.model.parameters()}
            widths.append(width(pl_module))

    fitted(module, Look(macs=0.5, when=1), epochs=3)
    assert widths[0] == 16 > widths[1] == widths[2]


def test_batches_pass_the_modules_hooks_and_only_so_many_are_taken() -> None:
    torch.manual_seed(0)
    sizes: list[float] = []

    class Watching(LitDigits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sizes.append(float(batch[0].abs().max()))
            return super().training_step(batch, batch_idx)

    data = [(torch.full((4, 1, 8, 8), 6.0), torch.arange(4) % 3), (torch.full((4, 1, 8, 8), 8.0), torch.arange(4) % 3)]
    fitted(Watching(), Compress(macs=0.9, when="start", loader=data, batches=1), limit_train_batches=0)
    assert set(sizes) == {3.0}


@pytest.mark.wide
def test_the_same_for_the_same_seed_and_training_is_not_disturbed() -> None:
    weights = []
    for callback in (Compress(macs=0.7), Compress(macs=0.7), Compress(macs=1.0, when="end")):
        torch.manual_seed(0)
        module = LitDigits()
        fitted(module, callback)
        weights.append((module.model.state_dict(), float(torch.rand(1))))
    assert all(torch.equal(weights[0][0][name], value) for name, value in weights[1][0].items())
    assert weights[0][1] == weights[2][1]


def test_kept_as_a_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LitDigits()
    fitted(module, Compress(macs=0.6))
    fxprune.save(module, tmp_path / "module.safetensors")
    again: Any = fxprune.load(tmp_path / "module.safetensors", LitDigits())
    images = torch.randn(2, 1, 8, 8)
    assert type(again) is LitDigits
    assert torch.equal(again.eval().model(images), module.eval().model(images))


class TwoParts(LitDigits):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.model(batch[0])), batch[1])


def test_the_network_is_named_where_there_are_several() -> None:
    module = TwoParts()
    with pytest.raises(FxpruneError, match=r"TwoParts has 2 children with parameters \(model, head\): pass network="):
        fitted(module, Compress(macs=0.6))
    assert network_of(LitDigits()) == "model"
    fitted(module, Compress(macs=0.6, network="model"))
    assert width(module) < 16
    assert type(module.head) is nn.Linear


class ByHand(LitDigits):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Silent(LitDigits):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.model(batch[0])


def test_modules_that_give_no_loss() -> None:
    with pytest.raises(FxpruneError, match="ByHand optimises by hand"):
        fitted(ByHand(), Compress(macs=0.6, when="start"))
    with pytest.raises(CalibrationError, match=r"Silent\.training_step returned a NoneType, not a loss"):
        fitted(Silent(), Compress(macs=0.6, when="start"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"when": "soon"}, "when is 'soon'"), ({"batches": 0}, "batches is 0: at least one is needed")],
)
def test_options_without_a_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxpruneError, match=message):
        Compress(**options)


def test_several_processes_are_refused() -> None:
    class Two:
        world_size = 2

    with pytest.raises(FxpruneError, match="the Trainer runs 2 processes, which would prune apart"):
        Compress().on_fit_end(Two(), LitDigits())


def test_several_loaders() -> None:
    trainer = Trainer(max_epochs=1, callbacks=[Compress(macs=0.6)], **SILENT)

    class Both(LitDigits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return LitDigits.training_step(self, batch["a"], batch_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(FxpruneError, match="the Trainer trains on a dict in place of one loader: pass loader="):
        trainer.fit(Both(), {"a": digit_batches(), "b": digit_batches()})
