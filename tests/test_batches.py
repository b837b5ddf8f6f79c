"""Loaders: data in place of one, loaders without an end, and how much of one is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fxprune
from fxprune.errors import CalibrationError

X, Y = torch.randn(12, 6), torch.arange(12) % 3
WRAPPED = r"torch\.utils\.data\.DataLoader\(dataset, batch_size=64\)"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without an end, which are counted."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.given = size, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.given += 1
            yield X[: self.size], Y[: self.size]


class Samples(Dataset[tuple[Tensor, int]]):
    """Single samples."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


DATA: dict[str, tuple[Any, str]] = {
    "a tensor": (X, r"is a Tensor, and it is read row by row: give a list of batches, \[\(x, y\)\] with targets y"),
    "a dict": ({"x": X, "labels": Y}, r"is a dict, and it is read key by key: put .*\[batch\]"),
    "a pair": ((X, Y), r"tuple, and its two tensors are read as two batches: give \[\(x, y\)\], or .*Dataset\(x, y\)"),
    "a list of two": ([X, X.double()], "is a list, and its two tensors are read as two batches"),
    "tensors": (TensorDataset(X, Y), rf"is a TensorDataset, and it gives single samples: wrap it, {WRAPPED}"),
    "a dataset": (Samples(), rf"is a Samples, and it gives single samples: wrap it, {WRAPPED}"),
    "samples": ([(X[0], 2)], r"of shape \(6,\) and the number 2, as single .*DataLoader\(samples, batch_size=64\)"),
    "tensors of samples": ([(X[0], Y[1])], "and the number 1, as single samples are: wrap them"),
    "a path": ("data/train", "is a str, and it gives no batches: give a list of batches, or a torch"),
    "None": (None, "the loader is None, and it gives no batches: give a list of batches, or a torch"),
    "a number": (3, r"the loader fails on batch 0 \(TypeError: 'int' .*\): give a list of batches, or a torch"),
    "an empty batch": ([(X, Y), (X[:0], Y[:0])], r"batch 1 of the loader has no samples, its first tensor is \(0, 6\)"),
    "empty batches": ([(X[:0], Y[:0])], "batch 0 of the loader has no samples"),
}  # fmt: skip


@pytest.mark.parametrize(("loader", "message"), DATA.values(), ids=DATA)
def test_data_in_place_of_a_loader(loader: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxprune.compress(network(), loader, 0.5, progress=False)


def test_loaders_that_look_like_data_but_are_none() -> None:
    def squares(output: Tensor, _: Any) -> Tensor:
        return output.square().mean()

    for loader in (X.split(6), [X, X], DataLoader(TensorDataset(X, Y), batch_size=4)):
        assert fxprune.score(network(), loader, squares, progress=False).about["samples"] in (12, 24)
    pairs = [(X, 0.5)] * 2
    assert fxprune.score(network(), pairs, squares, unpack=lambda pair: pair, progress=False).about["samples"] == 24


@pytest.mark.parametrize("wrap", [lambda endless: endless, lambda endless: DataLoader(endless, batch_size=None)])
def test_a_loader_without_an_end(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.caller.rank_batches.LONGEST", 20)
    endless = Endless()
    with pytest.raises(
        CalibrationError, match=r"the loader gives more than 20 batches, and may never end: pass max_samples= .*islice"
    ):
        fxprune.score(network(), wrap(endless), progress=False)
    assert endless.given == 23  # two for capturing, and one more than there may be


def test_a_training_loader_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning_fabric")
    monkeypatch.setattr("fxprune.recovery.epochs.LONGEST_EPOCH", 9)
    small = fxprune.apply(network(), fxprune.Scores.random(network(), X).plan(0.5))
    with pytest.raises(CalibrationError, match="train_loader gives more than 9 batches"):
        fxprune.finetune(small, Endless(), [(X, Y)], epochs=1, progress=False)


@pytest.mark.filterwarnings("ignore:the original is right on")  # with weights and labels that are random
@pytest.mark.parametrize(("most", "read"), [(1, 1), (4, 1), (5, 2), (12, 3), (100, 25)])
def test_no_batch_is_read_behind_max_samples(most: int, read: int) -> None:
    endless, model = Endless(), network()
    found = fxprune.score(model, endless, max_samples=most, progress=False)
    assert endless.given == read + 2  # and two for capturing
    assert found.about["samples"] == 4 * read
    same = fxprune.score(model, [(X[:4], Y[:4])] * read, progress=False)
    assert found.propose.tolist() == same.propose.tolist()


@pytest.mark.parametrize("run", [None, lambda model, x, y: nn.functional.cross_entropy(model(x), y)])
def test_compression_as_a_whole_reads_no_more(run: Any) -> None:
    endless, model = Endless(12), network()
    small = fxprune.compress(model, endless, 0.9, max_samples=30, run=run, progress=False)
    assert endless.given == 2 + 3 + 3  # for capturing, for scores, and for compensation
    same = fxprune.compress(model, [(X, Y)] * 3, 0.9, run=run, progress=False)
    for name, weight in small.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
