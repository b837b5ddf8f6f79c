"""The provenance in a report: by which call, of what data, when, and with which versions a model was made."""

from __future__ import annotations

import dataclasses
import platform
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from zoo import ZOO, images

import fxprune
from fxprune.pipeline import apply, compress
from fxprune.reporting.provenance import call_of, data_of
from fxprune.saving.container import read_artifact

BATCHES = [(images()(20), torch.arange(20) % 5)]


def provenance(small: nn.Module) -> Any:
    found = fxprune.report(small).provenance
    assert found is not None
    return found


def test_compress_notes_its_call_its_data_and_the_versions() -> None:
    data = TensorDataset(*BATCHES[0])
    loader = DataLoader(Subset(data, range(15)), batch_size=5)
    start = datetime.now(timezone.utc) - timedelta(seconds=1)
    small = fxprune.compress(
        ZOO["residual"].build(), loader, 0.3, exclude=["head"], loss=nn.functional.cross_entropy, seed=3,
        samples_per_class=4, progress=False,
    )  # fmt: skip
    found = provenance(small)
    assert found.call == (
        "compress(model, loader, alpha=0.3, loss=cross_entropy, exclude=['head'], seed=3, progress=False, "
        "samples_per_class=4)"
    )
    assert (found.data, found.data_size, found.samples, found.seed) == ("Subset of TensorDataset", 15, 15, 3)
    versions = {"fxprune": fxprune.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    assert found.versions == versions
    assert start <= datetime.fromisoformat(found.date) <= datetime.now(timezone.utc)
    assert (found.model, found.weights, found.file) == (None, None, None)


@pytest.mark.wide
def test_several_rounds_and_parts_note_the_call_once() -> None:
    options = {"rounds": 2, "macs": 0.7, "progress": False}
    found = provenance(fxprune.compress(ZOO["residual"].build(), BATCHES, **options))
    assert found.call == "compress(model, loader, macs=0.7, rounds=2, progress=False)"
    assert found.samples == 20
    whole = nn.Sequential(ZOO["mlp"].build(), nn.Identity())
    rows = [(torch.rand(20, 6), torch.arange(20) % 5)]
    small = fxprune.compress(whole, rows, 0.3, submodule="0", progress=False)
    assert provenance(small).call == "compress(model, loader, alpha=0.3, progress=False, submodule='0')"


def test_apply_notes_its_own_call() -> None:
    model = ZOO["residual"].build()
    scores = fxprune.Scores.random(model, images()(2))
    plan = scores.plan(0.3)
    found = provenance(fxprune.apply(model, plan))
    assert (found.call, found.data, found.samples) == ("apply(model, plan)", None, None)
    found = provenance(fxprune.apply(model, plan, scores=scores, loader=BATCHES, compensate="sequential", device="cpu"))
    assert found.call == "apply(model, plan, scores=..., loader=..., compensate='sequential', device='cpu')"
    assert found.data == "list"


def test_reports_that_differ_in_the_date_alone_are_equal() -> None:
    model, plan = ZOO["mlp"].build(), fxprune.Scores.random(ZOO["mlp"].build(), torch.rand(2, 6)).plan(0.3)
    one = fxprune.report(fxprune.apply(model, plan))
    assert one.provenance is not None
    other = dataclasses.replace(one, provenance=dataclasses.replace(one.provenance, date="2001-01-01T00:00:00+00:00"))
    assert one == other
    assert one != dataclasses.replace(one, provenance=dataclasses.replace(one.provenance, call="apply(a, b)"))


def test_a_saved_model_keeps_its_provenance(tmp_path: Path) -> None:
    model = ZOO["mlp"].build()
    small = fxprune.apply(model, fxprune.Scores.random(model, torch.rand(2, 6)).plan(0.3))
    fxprune.save(small, tmp_path / "one")
    again = fxprune.load(tmp_path / "one", model)
    assert dataclasses.astuple(provenance(again)) == dataclasses.astuple(provenance(small))  # the date, too
    fxprune.save(again, tmp_path / "two")
    one, two = (read_artifact(tmp_path / name)[0].to_text() for name in ("one", "two"))
    assert one == two


class Stream(IterableDataset):
    """Data of unknown length."""

    def __iter__(self) -> Any:
        return iter(())


class Own:
    """A loader whose properties must not run."""

    @property
    def dataset(self) -> Any:
        raise RuntimeError("the network is down")


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (DataLoader(Stream()), ("Stream", None)),
        (DataLoader(Subset(Subset([1, 2, 3], [0, 1]), [0])), ("Subset of Subset of list", 1)),
        (Own(), ("Own", None)), ((1, 2), ("tuple", None)), (None, (None, None)),
    ],
)  # fmt: skip
def test_data_are_named_by_their_class(loader: Any, found: Any) -> None:
    assert data_of(loader) == found


def own_loss(output: Any, target: Any) -> Any:
    raise NotImplementedError


def test_arguments_are_shown_as_code_without_asking_them() -> None:
    given = {"model": nn.Linear(2, 2), "loader": Own(), "alpha": None, "macs": 0.5, "loss": own_loss}
    given |= {"exclude": (nn.Conv2d, "a"), "device": torch.device("cuda", 1), "run": nn.Linear(1, 1), "seed": 0}
    given |= {"finetune": {"epochs": 3, "train_loader": Own()}, "scoring": {"every": 7}}
    others = compress.__kwdefaults__ or {}
    assert call_of(compress, others | {"submodule": "b" * 99} | given) == (
        "compress(model, loader, macs=0.5, loss=own_loss, exclude=[the class Conv2d, 'a'], device='cuda:1', "
        f"submodule='{'b' * 59}..., run=..., finetune={{'epochs': 3, 'train_loader': ...}}, every=7)"
    )
    assert call_of(apply, {"model": 1, "plan": 2} | (apply.__kwdefaults__ or {})) == "apply(model, plan)"
